"""Algorithm 1 on one line of text, with the real numbers of a model, step by step.

    python -m tools.walk --model runs/1/quiet_star
    python -m tools.walk --model FOLDER --text "The sum of 2 and 3 is 5." --position 9

Thoughts are sampled after one position only (without --position: where a greedy thought helps
most), so that every number of the six steps can be followed. Letters and names are those of
thoughts.py; what is printed is what its functions return.
"""

import argparse
import copy

import torch
from torch import Tensor

from support import corpus
from support.checkpoints import load
from support.terminal import execute, make_parser
from support.tokenizer import Tokenizer
from thoughts import (
    Output,
    QuietStar,
    ThoughtConfig,
    base_ahead,
    log_likelihood,
    quiet_star_loss,
    reward,
    thought_mask,
)

TEXT = corpus.puzzle_line(corpus.all_puzzles(held_out=False)[5]) + corpus.puzzle_line(
    corpus.all_puzzles(held_out=True)[40]
)


def probabilities(nll: Tensor) -> str:
    """exp(-nll) of a few tokens."""
    return "  ".join(f"{p:.4f}" for p in (-nll).exp().tolist())


def most_helped(model: QuietStar, ids: Tensor) -> int:
    """The position of ids [1, T] where a greedy thought gains most."""
    with torch.no_grad():
        output = model(ids, temperature=0)
    base_nll = base_ahead(output.base_nll, output.positions, output.valid)  # [A, 1, 1, J]
    gain = log_likelihood(output.talk_nll) - log_likelihood(base_nll)  # [1, N, J]
    return int(output.positions[gain[0, 0].argmax()])


def heard_alone(model: QuietStar, ids: Tensor, output: Output) -> Tensor:
    """nll [A, 1, N, J] of p_thought: the same thoughts at w = 0."""
    listener = copy.copy(model)  # shares all weights
    listener.mixing_weight = lambda h_init, h_thought: torch.zeros_like(h_init[..., 0])
    return listener(ids, output.thought_ids, output.positions).talk_nll


def draw_mask(config: ThoughtConfig, j: int, ids: Tensor, window: int | None, spell) -> list[str]:
    """Figure 3 of the paper for one thought: a row for every step, # for a key that it sees."""
    T, steps = ids.shape[1], config.thought_length + config.n_true + 1
    names = ["start", *(f"t_{k}" for k in range(1, config.thought_length + 1)), "end"]
    names += [f"x_{j + a} {spell(ids[0, j + a])}" for a in range(1, config.n_true)]
    text = "".join(f"{spell(token)[0]}" for token in ids[0])
    lines = [f"{'':18}{text} | steps 1 .. {steps}"]
    for step, name in enumerate(names, 1):
        [[visible]] = thought_mask(torch.tensor([j]), range(step, step + 1), T, window).tolist()
        row = ["#" if seen else "." for seen in visible]
        lines.append(f"{step:4}  {name:12}{''.join(row[:T])} | {''.join(row[T:])}")
    return lines


def gradients(model: QuietStar, losses: dict[str, Tensor]) -> list[str]:
    """The norm of each loss' gradient, by the part of the model it goes to."""
    parts = {
        "embed_tokens": "model.embed_tokens.", "layers": "model.layers.", "norm": "model.norm.",
        "lm_head": "model.lm_head.", "start": "start_embedding", "end": "end_embedding",
        "mixing_head": "mixing_head.",
    }  # fmt: skip
    named = dict(model.named_parameters())  # a tied head is there once, as embed_tokens
    lines = [f"{'':14}" + "".join(f"{name:>14}" for name in losses)]
    columns = []
    for loss in losses.values():
        if not loss.requires_grad:  # REINFORCE with K = 0: nothing was sampled
            columns.append({})
            continue
        found = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
        columns.append(dict(zip(named, found, strict=True)))
    for part, prefix in parts.items():
        cells = []
        for column in columns:
            norms = [g.norm() for n, g in column.items() if n.startswith(prefix) and g is not None]
            norm = torch.stack(norms).norm().item() if norms else 0.0
            cells.append(f"{norm:14.6f}" if norm else f"{'-':>14}")
        lines.append(f"{part:14}" + "".join(cells))
    return lines


def walk(model: QuietStar, tokenizer: Tokenizer, ids: Tensor, j: int, seed: int) -> str:
    """All six steps for thoughts sampled after position j of ids [1, T], as text."""
    config, T = model.config, ids.shape[1]
    N, K, A = config.n_thoughts, config.thought_length, config.n_true

    def spell(token) -> str:
        return tokenizer.spell([int(token)]).replace("\n", "\\n")

    output = model(ids, positions=torch.tensor([j]), generator=torch.Generator().manual_seed(seed))
    base_nll, talk_nll = output.base_nll[0], output.talk_nll[:, 0, :, 0]  # [T-1], [A, N]
    ahead = base_nll[j : j + A]  # of x_{j+1} .. x_{j+A} without a thought
    targets = "  ".join(f"x_{j + 1 + a} = {spell(ids[0, j + 1 + a])}" for a in range(A))
    lines = [
        "1 base: the model reads the text once, and predicts every next token",
        f"    x_0 .. x_{T - 1}    {tokenizer.spell(ids[0].tolist())!r}",
        f"    j = {j}, after {spell(ids[0, j])!r}; what comes next: {targets}",
        f"    p_init of these      {probabilities(ahead)}",
        "",
        f"2 think: after x_0 .. x_{j}, start, N = {N} thoughts of K = {K} tokens are sampled;",
        "  a step sees the text up to j and its own thought so far (thought_mask, Figure 3);",
        f"  p of tokens is that of REINFORCE, at temperature {config.reinforce_temperature:g}",
        *draw_mask(config, j, ids, model.model.config.sliding_window, spell),
    ]
    for n in range(N):
        thought, logp = output.thought_ids[0, n, 0], output.thought_logp[0, n, 0]
        text = tokenizer.spell(thought.tolist())
        lines.append(f"    thought {n + 1}  {text!r}  log p = {logp.sum():.4f}")
        lines.append(f"      p of each token    {probabilities(-logp)}")
    lines += ["", f"3 talk: end and the true tokens are read, and A = {A} tokens predicted"]
    alone = heard_alone(model, ids, output)[:, 0, :, 0]  # [A, N]
    for n in range(N):
        lines.append(f"    p_thought {n + 1}          {probabilities(alone[:, n])}")
    lines += ["", "4 mix: log p_talk = w log p_init + (1 - w) log p_thought, made to sum to 1"]
    for n in range(N):
        w = "  ".join(f"{weight:.4f}" for weight in output.weight[:, 0, n, 0].tolist())
        lines.append(f"    w {n + 1}                  {w}")
        lines.append(f"    p_talk {n + 1}             {probabilities(talk_nll[:, n])}")
    minus = "its mean over N" if N > 1 else "R without a thought, since N = 1"
    lines += ["", f"5 reward: R = sum of log p_talk over the A tokens, r = R minus {minus}"]
    r = reward(output.talk_nll, output.base_nll, output.positions, output.valid)[0, :, 0]  # [N]
    lines.append(f"    without a thought    R = {log_likelihood(ahead):.4f}")
    for n in range(N):
        dropped = "  (negative: dropped)" if config.drop_negative and r[n] < 0 else ""
        R = log_likelihood(talk_nll[:, n])
        lines.append(f"    thought {n + 1}            R = {R:.4f}  r = {r[n]:+.4f}{dropped}")
    loss, _ = quiet_star_loss(output, config)
    c, weight = config.base_weight, config.reinforce_weight
    advantage = r.clamp(min=0) if config.drop_negative else r
    terms = {
        "L_base": output.base_nll.mean(),
        "L_NLL": output.talk_nll.mean(),
        "L_REINFORCE": -(advantage * output.thought_logp[0, :, 0].sum(-1)).mean(),
    }
    values = "  ".join(f"{name} = {value:.4f}" for name, value in terms.items())
    total = f"{c:g} L_base + {1 - c:g} L_NLL + {weight:g} L_REINFORCE = {loss:.4f}"
    lines += [
        "",
        f"6 loss: {values}",
        f"    L = {total}",
        "    norm of the gradient, by where it goes:",
    ]
    return "\n".join([*lines, *(f"    {line}" for line in gradients(model, terms))])


def run(options: argparse.Namespace) -> None:
    """Load, choose the position, print."""
    model, tokenizer = load(options.model, torch.device("cpu"), torch.float32)
    if not isinstance(model, QuietStar):
        raise ValueError(f"{options.model} is a plain model: it has no thoughts to follow")
    ids = torch.tensor([tokenizer.encode(options.text, bos=tokenizer.adds_bos)])
    last = ids.shape[1] - 1 - model.config.n_true
    if last < 0 or not 0 <= (options.position or 0) <= last:
        raise ValueError(
            f"--position is {options.position}; of a text of {ids.shape[1]} tokens it can be "
            f"0 .. {last}: {model.config.n_true} (n_true) have to follow"
        )
    j = most_helped(model, ids) if options.position is None else options.position
    print(walk(model, tokenizer, ids, j, options.seed))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a thinking model")
    add("--text", default=TEXT, help="what it reads; none: two lines of the built-in corpus")
    add("--position", type=int, metavar="J", help="where it thinks; none: where that helps most")
    add("--seed", type=int, default=0, help="of the thoughts (0)")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
