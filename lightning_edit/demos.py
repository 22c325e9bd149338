# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A world small enough to learn in a second: models, facts and edits for doctests and tests.

The world has six countries and their capitals, all invented. Countries have a capital and a
language, capitals a river and the color of a flag: 24 facts in four relations.
"""

# Shapes: B sentences, T tokens, D hidden size, N answer tokens of all sentences, V vocabulary.

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_edit.core.errors import ModelError
from lightning_edit.core.request import EditRequest, Probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "WORLD",
    "TinyFact",
    "TinyKind",
    "tiny_model",
    "tiny_requests",
    "tiny_tokenizer",
    "trained_tiny_model",
    "world_sentences",
]

TinyKind = Literal["llama", "gpt2", "t5"]

# Small enough that some names are one token and others several.
_VOCABULARY = 424
_STEPS = 500

# country, its old name, capital, language, river of the capital, color of the capital's flag
_COUNTRIES = (
    ("Velmora", "Old Velm", "Dorin", "Velmic", "Assel", "red"),
    ("Ostrane", "Old Ostra", "Kettleby", "Ostrish", "Brune", "green"),
    ("Quillia", "Old Quill", "Marpeth", "Quillan", "Corva", "white"),
    ("Brundor", "Old Brund", "Sallow", "Brundic", "Delph", "red"),
    ("Tasmere", "Old Tasm", "Ivory Bay", "Tasmese", "Ember", "green"),
    ("Yarveth", "Old Yarv", "Nimbus", "Yarvan", "Fennel", "white"),
)

_PROMPTS = {
    "capital": ("The capital of {} is", "{} has its capital in", "What is the capital of {}?"),
    "language": ("People in {} speak", "The language of {} is", "Which language has {}?"),
    "river": ("The river of {} is the", "{} lies on the", "Which river has {}?"),
    "flag": ("The flag of {} is", "{} has a flag that is", "Which color has the flag of {}?"),
}
_INVERSE = {
    "capital": "{} is the capital of",
    "language": "{} is spoken in",
    "river": "The {} flows through",
}
_ONE_HOP = {
    "river": "The river of the capital of {} is the",
    "flag": "The flag of the capital of {} is",
}


@dataclass(frozen=True)
class TinyFact:
    """One fact of the world.

    Args:
        relation: ``capital``, ``language``, ``river`` or ``flag``.
        subject: What the fact is about.
        answer: The object of the relation.
        country: The country that the fact belongs to.
        alias: Another name of the subject, or empty.
    """

    relation: str
    subject: str
    answer: str
    country: str
    alias: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The fact's wordings, the first one first; the last one is a question."""
        return tuple(prompt.format(self.subject) for prompt in _PROMPTS[self.relation])


def _world() -> Iterator[TinyFact]:
    for country, alias, capital, language, river, flag in _COUNTRIES:
        yield TinyFact("capital", country, capital, country, alias)
        yield TinyFact("language", country, language, country, alias)
        yield TinyFact("river", capital, river, country)
        yield TinyFact("flag", capital, flag, country)


WORLD: tuple[TinyFact, ...] = tuple(_world())


def _probes(fact: TinyFact, answer: str) -> tuple[Probe, ...]:
    """What follows when the fact's answer is this one."""
    probes = []
    if fact.alias:
        prompt = _PROMPTS[fact.relation][0].format(fact.alias)
        probes.append(Probe(prompt, answer, "subject_alias"))
    if fact.relation in _INVERSE:
        probes.append(Probe(_INVERSE[fact.relation].format(answer), fact.subject, "inverse"))
    if fact.relation in _ONE_HOP:
        probes.append(Probe(_ONE_HOP[fact.relation].format(fact.country), answer, "one_hop"))
    if fact.relation == "capital":
        for other in WORLD:
            if other.subject == answer:
                prompt = _ONE_HOP[other.relation].format(fact.country)
                probes.append(Probe(prompt, other.answer, "one_hop"))
    return tuple(probes)


def world_sentences() -> list[tuple[str, str]]:
    """All that is said in the world: prompts and their answers, without repetition.

    Examples:
        >>> world_sentences()[0]
        ('The capital of Velmora is', 'Dorin')
    """
    pairs = []
    for fact in WORLD:
        pairs += [(prompt, fact.answer) for prompt in fact.prompts]
        pairs += [(probe.prompt, probe.answer) for probe in _probes(fact, fact.answer)]
    return list(dict.fromkeys(pairs))


def tiny_requests(n: int = 4) -> list[EditRequest]:
    """The first n facts of the world, each to take the answer of the next one of its relation.

    Every request has rephrases, probes of locality (neighborhood, distracting, unrelated) and of
    portability.

    Args:
        n: Number of requests, at most 24. Their subjects and relations differ.

    Raises:
        ValueError: If n is not between 1 and 24.

    Examples:
        >>> request = tiny_requests(1)[0]
        >>> request.prompt, request.target_old, request.target_new
        ('The capital of Velmora is', 'Dorin', 'Kettleby')
        >>> [probe.kind for probe in request.locality]
        ['neighborhood', 'neighborhood', 'distracting', 'unrelated']
    """
    if not 1 <= n <= len(WORLD):
        raise ValueError(f"`n` is expected to be between 1 and {len(WORLD)}, but got {n}.")
    requests = []
    for fact in WORLD[:n]:
        kin = [other for other in WORLD if other.relation == fact.relation]
        at = kin.index(fact)
        new = kin[(at + 1) % len(kin)].answer
        near = [kin[(at + step) % len(kin)] for step in (2, 3)]
        far = next(
            other
            for other in WORLD
            if other.country not in (fact.country, near[0].country)
            and other.relation not in (fact.relation, "capital")
        )
        prompt, *rephrases = fact.prompts
        requests.append(
            EditRequest(
                prompt=prompt,
                subject=fact.subject,
                target_new=new,
                target_old=fact.answer,
                rephrases=tuple(rephrases),
                locality=(
                    *(Probe(kind.prompts[0], kind.answer) for kind in near),
                    Probe(f"{prompt} {new}. {near[0].prompts[0]}", near[0].answer, "distracting"),
                    Probe(far.prompts[0], far.answer, "unrelated"),
                ),
                portability=_probes(fact, new),
                id=f"{fact.relation}-{fact.subject.lower().replace(' ', '-')}",
            )
        )
    return requests


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's sentences, made in milliseconds.

    As in GPT-2 a word carries the space before it, and any text can be encoded. There is an end
    token, a pad token of its own and no token for the beginning.

    Examples:
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.tokenize("The capital of Dorin")
        ['The', 'Ġcapital', 'Ġof', 'ĠDorin']
        >>> tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token
        ('<pad>', '<end>', None)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{p} {a}. {p}" for p, a in world_sentences()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128)
    fast.add_special_tokens({"pad_token": "<pad>", "eos_token": "<end>"})
    return fast


def tiny_model(kind: TinyKind = "llama", seed: int = 0) -> PreTrainedModel:
    """A model of four layers and random weights, for the tokenizer of ``tiny_tokenizer``.

    Args:
        kind: Architecture: ``llama`` (gated MLP), ``gpt2`` (transposed weights) or ``t5``
            (encoder-decoder).
        seed: Of the weights. The global random state is left alone.

    Returns:
        The model in float32 and eval mode.

    Raises:
        ModelError: If the kind is not one of these.

    Examples:
        >>> model = tiny_model()
        >>> model.config.num_hidden_layers, model.config.hidden_size
        (4, 32)
    """
    import transformers

    tokens: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    match kind:
        case "llama":
            config = transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                **tokens,
            )
        case "gpt2":
            config = transformers.GPT2Config(
                n_embd=32,
                n_layer=4,
                n_head=4,
                n_positions=128,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **tokens,
            )
        case "t5":
            config = transformers.T5Config(
                d_model=32,
                d_ff=128,
                d_kv=8,
                num_layers=4,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                **tokens,
            )
        case _:
            raise ModelError(f"`kind` is expected to be llama, gpt2 or t5, but got {kind!r}.")
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


def trained_tiny_model(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The tiny Llama, trained until it answers every sentence of the world rightly.

    Training takes a few seconds, once in a process; each call returns a model of its own.

    Args:
        seed: Of the initial weights.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError: If the training does not reach the goal.

    Examples:
        >>> model, tokenizer = trained_tiny_model()
        >>> prompt = tokenizer("The capital of Velmora is", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**prompt, max_new_tokens=8)[0])
        'The capital of Velmora is Dorin.<end>'
    """
    model = tiny_model(seed=seed)
    model.load_state_dict(_trained_weights(seed))
    return model, tiny_tokenizer()


@functools.cache
def _trained_weights(seed: int) -> dict[str, Tensor]:
    model, tokenizer = tiny_model(seed=seed), tiny_tokenizer()
    pairs = world_sentences()
    tokens = tokenizer([f"{p} {a}.<end>" for p, a in pairs], padding=True, return_tensors="pt")
    starts_B = torch.tensor([len(tokenizer(prompt).input_ids) for prompt, _ in pairs])
    positions_T = torch.arange(tokens.input_ids.shape[1])
    is_answer_BT = tokens.attention_mask.bool() & (positions_T >= starts_B[:, None])
    answers_N = tokens.input_ids[is_answer_BT]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0, foreach=False
    )
    for _ in range(_STEPS):
        hidden_BTD = model.model(**tokens).last_hidden_state
        logits_NV = model.lm_head(hidden_BTD[:, :-1][is_answer_BT[:, 1:]])
        loss = nn.functional.cross_entropy(logits_NV, answers_N)
        if loss < 0.02 and logits_NV.argmax(-1).equal(answers_N):
            return {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    raise ModelError(f"The tiny model did not learn its world in {_STEPS} steps (seed {seed}).")
