# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Many runs as one table: methods, data sets, protocols and seeds, measured alike."""
