"""Tiny random models, and the slow, obvious way to think, for the tests of thoughts.py."""

import torch
from torch import Tensor

from model import KVCache, Mistral, MistralConfig
from thoughts import QuietStar, ThoughtConfig, token_logits


def tiny_mistral(seed: int = 0, V: int = 23, window: int | None = None) -> Mistral:
    """Two layers, four query heads on two key/value heads, head size unlike width / heads."""
    torch.manual_seed(seed)
    return Mistral(MistralConfig(V, 16, 32, 2, 4, 2, head_dim=6, sliding_window=window))


def tiny_quiet_star(seed: int = 0, V: int = 23, window: int | None = None, **thoughts) -> QuietStar:
    """A thinking model in mid-training: every parameter random, so w is not 1."""
    settings = {"n_thoughts": 3, "thought_length": 3, "n_true": 2, "policy_weight": 1.0}
    model = QuietStar(tiny_mistral(seed, V, window), ThoughtConfig(**settings | thoughts))
    for parameter in (model.start_embedding, model.end_embedding):
        torch.nn.init.normal_(parameter, std=0.3 / model.config.embedding_scale)
    torch.nn.init.normal_(model.mixing_head[4].weight)
    return model


def random_ids(B: int, T: int, V: int = 23, seed: int = 1) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def think_slowly(model: QuietStar, text: Tensor, j: int, thought: list[int] | None) -> dict:
    """One greedy (or forced) thought at position j of one text [T], as an ordinary sequence.

    Everything is written out and run through the plain model from the start, again and again:
    x_:j, start, t_1 .. t_K, end, x_{j+1} .. -> hidden states after each, thought, log p, nll, w.
    """
    config, mistral = model.config, model.model
    scale, head = config.embedding_scale, mistral.lm_head.weight

    def run(x: Tensor) -> Tensor:
        return mistral.run(x[None], KVCache(mistral.config))[0]  # [length, D]

    h_init = run(mistral.embed_tokens(text))
    x = torch.cat([mistral.embed_tokens(text[: j + 1]), model.start_embedding[None] * scale])
    ids, logp = [], []
    for k in range(config.thought_length):
        logits = token_logits(run(x)[-1], head, model.excluded)
        ids.append(int(logits.argmax()) if thought is None else thought[k])
        logp.append(torch.log_softmax(logits / config.reinforce_temperature, -1)[ids[-1]])
        x = torch.cat([x, mistral.embed_tokens(torch.tensor(ids[-1:]))])
    x = torch.cat([x, model.end_embedding[None] * scale])
    nll, weight, hidden = [], [], []
    for a in range(config.n_true):
        if j + 1 + a >= len(text):
            break
        h_thought = run(x)[-1]
        both = torch.cat([h_init[j + a], h_thought])
        w = 1 - model.mixing_head(both).squeeze()
        mixed = w * (h_init[j + a] @ head.T) + (1 - w) * (h_thought @ head.T)
        nll.append(-torch.log_softmax(mixed, -1)[text[j + 1 + a]])
        weight.append(w)
        hidden.append(h_thought)
        x = torch.cat([x, mistral.embed_tokens(text[j + 1 + a : j + 2 + a])])
    return {"ids": ids, "logp": logp, "nll": nll, "weight": weight, "hidden": hidden}
