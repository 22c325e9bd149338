# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
