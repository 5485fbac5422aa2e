"""Algorithm 1 on one line of text, with the numbers of a model, step by step.

    python -m tools.walk --model runs/1/quiet_star
    python -m tools.walk --model FOLDER --text "The sum of 2 and 3 is 5." --position 9

Thoughts are sampled after one position only, so that all numbers fit on one page: by default, the
position where a greedy thought helps most. Letters, names and functions are those of thoughts.py.
"""

import argparse
import copy

import torch
from torch import Tensor

import thoughts
from support.checkpoints import load
from support.terminal import execute, make_parser
from support.tokenizer import Tokenizer
from thoughts import Output, QuietStar, log_likelihood

TEXT = "000021=0\n021102=0\n"  # of the built-in corpus; the second puzzle is held out
PARTS = (
    "embed_tokens", "layers", "norm", "lm_head", "start_embedding", "end_embedding", "mixing_head",
)  # fmt: skip


def probabilities(nll: Tensor) -> str:
    """exp(-nll) of a few tokens."""
    return "  ".join(f"{p:.4f}" for p in (-nll).exp().tolist())


@torch.no_grad()
def most_helped(model: QuietStar, ids: Tensor) -> int:
    """The position in ids [1, T] where a greedy thought raises R most.

    Raises ValueError if the logits of the model are not finite.
    """
    output = model(ids, temperature=0)
    if not (model.model(ids).isfinite().all() and output.talk_nll.isfinite().all()):
        raise ValueError("the logits are not finite: the weights are broken")
    base_nll = thoughts.base_ahead(output.base_nll, output.positions, output.valid)  # [A, 1, 1, J]
    gain = log_likelihood(output.talk_nll) - log_likelihood(base_nll)  # [1, N, J]
    return int(output.positions[gain[0, 0].argmax()])


def thoughts_alone(model: QuietStar, ids: Tensor, output: Output) -> Tensor:
    """nll [A, 1, N, J] of p_thought: that of the same thoughts with w = 0."""
    unmixed = copy.copy(model)  # shares all weights
    unmixed.mixing_weight = lambda h_init, h_thought: torch.zeros_like(h_init[..., 0])
    return unmixed(ids, output.thought_ids, output.positions).talk_nll


def print_mask(model: QuietStar, ids: Tensor, j: int, spell) -> None:
    """Figure 3 of the paper for one thought: a row for every step, # for a key that it sees."""
    T, K, A = ids.shape[1], model.config.thought_length, model.config.n_true
    names = ["start", *(f"t_{k}" for k in range(1, K + 1)), "end"]
    names += [f"x_{j + a} {spell(ids[0, j + a])}" for a in range(1, A)]
    steps, window = range(1, K + A + 2), model.model.config.sliding_window
    [visible] = thoughts.thought_mask(torch.tensor([j]), steps, T, window).tolist()
    print(f"{'':18}{''.join(spell(token)[0] for token in ids[0])} | steps 1 .. {steps[-1]}")
    for step, name, row in zip(steps, names, visible, strict=True):
        keys = "".join(".#"[seen] for seen in row)
        print(f"{step:4}  {name:12}{keys[:T]} | {keys[T : T + step]}")


def print_gradients(model: QuietStar, losses: dict[str, Tensor]) -> None:
    """A table of the gradient norm of each loss in each of the PARTS of the model."""
    named, columns = dict(model.named_parameters()), []  # a tied head is there as embed_tokens
    for loss in losses.values():
        found = [None] * len(named)
        if loss.requires_grad:  # REINFORCE does not with K = 0
            found = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
        columns.append(dict(zip(named, found, strict=True)))
    print(f"{'':20}" + "".join(f"{name:>14}" for name in losses))
    for part in PARTS:
        line = f"    {part:16}"
        for column in columns:
            grads = [g for n, g in column.items() if part in n.split(".") and g is not None]
            norm = torch.stack([g.norm() for g in grads]).norm().item() if grads else 0
            line += f"{norm:14.6f}" if norm else f"{'-':>14}"
        print(line)


def walk(model: QuietStar, tokenizer: Tokenizer, ids: Tensor, j: int, seed: int) -> None:
    """Print all six steps for thoughts sampled after position j of ids [1, T]."""
    config, T = model.config, ids.shape[1]
    N, K, A = config.n_thoughts, config.thought_length, config.n_true

    def spell(token) -> str:
        return tokenizer.spell([int(token)]).replace("\n", "\\n")

    output = model(ids, positions=torch.tensor([j]), generator=torch.Generator().manual_seed(seed))
    base_nll, talk_nll = output.base_nll[0, j : j + A], output.talk_nll[:, 0, :, 0]  # [A], [A, N]
    targets = "  ".join(f"x_{j + 1 + a} = {spell(ids[0, j + 1 + a])}" for a in range(A))
    print("1 base: the model reads the text once and predicts every next token")
    print(f"    x_0 .. x_{T - 1}    {tokenizer.spell(ids[0].tolist())!r}")
    print(f"    j = {j}, after {spell(ids[0, j])!r}; the next tokens: {targets}")
    print(f"    p_init of these      {probabilities(base_nll)}")

    print(f"\n2 think: after x_0 .. x_{j}, start, N = {N} thoughts of K = {K} tokens are sampled;")
    print("  a step sees the text up to j and its own thought so far (thought_mask, Figure 3);")
    print(f"  p of tokens is that of REINFORCE, at temperature {config.reinforce_temperature:g}")
    print_mask(model, ids, j, spell)
    for n in range(N):
        thought, logp = output.thought_ids[0, n, 0], output.thought_logp[0, n, 0]
        print(
            f"    thought {n + 1}  {tokenizer.spell(thought.tolist())!r}  log p = {logp.sum():.4f}"
        )
        print(f"      p of each token    {probabilities(-logp)}")

    print(f"\n3 talk: one pass reads t_K, end and the true tokens, and predicts A = {A} tokens")
    for n, nll in enumerate(thoughts_alone(model, ids, output)[:, 0, :, 0].T):
        print(f"    p_thought {n + 1}          {probabilities(nll)}")

    print("\n4 mix: log p_talk = w log p_init + (1 - w) log p_thought, normalised")
    for n in range(N):
        w = "  ".join(f"{weight:.4f}" for weight in output.weight[:, 0, n, 0].tolist())
        print(f"    w {n + 1}                  {w}")
        print(f"    p_talk {n + 1}             {probabilities(talk_nll[:, n])}")
    print_reward_and_loss(model, output, base_nll)


def print_reward_and_loss(model: QuietStar, output: Output, base_nll: Tensor) -> None:
    """Print steps 5 and 6. base_nll [A]: nll of the targets without a thought."""
    config, N = model.config, model.config.n_thoughts
    minus = "its mean over N" if N > 1 else "R without a thought, since N = 1"
    print(f"\n5 reward: R = sum of log p_talk over the A tokens, r = R minus {minus}")
    print(f"    without a thought    R = {log_likelihood(base_nll):.4f}")
    _, logp, every_nll, talk_nll, _, valid, positions, _ = output
    r = thoughts.reward(talk_nll, every_nll, positions, valid)[0, :, 0]  # [N]
    for n, R in enumerate(log_likelihood(talk_nll)[0, :, 0].tolist()):
        dropped = "  (negative: dropped)" if config.drop_negative and r[n] < 0 else ""
        print(f"    thought {n + 1}            R = {R:.4f}  r = {r[n]:+.4f}{dropped}")
    r = r.clamp(min=0) if config.drop_negative else r
    L_REINFORCE = -(r * logp[0, :, 0].sum(-1)).mean()
    terms = {"L_base": every_nll.mean(), "L_NLL": talk_nll.mean(), "L_REINFORCE": L_REINFORCE}
    loss, _ = thoughts.quiet_star_loss(output, config)
    c, weight = config.base_weight, config.reinforce_weight
    print("\n6 loss: " + "  ".join(f"{name} = {value:.4f}" for name, value in terms.items()))
    print(f"    L = {c:g} L_base + {1 - c:g} L_NLL + {weight:g} L_REINFORCE = {loss:.4f}")
    print("    gradient norms:")
    print_gradients(model, terms)


def run(options: argparse.Namespace) -> None:
    """Load the model, choose the position, and print the steps."""
    model, tokenizer = load(options.model, torch.device("cpu"), torch.float32)
    if not isinstance(model, QuietStar):
        raise ValueError(f"{options.model} is a plain model: it has no thoughts to follow")
    ids = torch.tensor([tokenizer.encode(options.text, bos=tokenizer.adds_bos)])
    last = ids.shape[1] - 1 - model.config.n_true
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed is {options.seed}; it must be a whole number from 0 to 2**63 - 1")
    if last < 0 or not 0 <= (options.position or 0) <= last:
        raise ValueError(
            f"--position is {options.position}; in a text of {ids.shape[1]} tokens it can be "
            f"0 .. {last}, because {model.config.n_true} tokens (n_true) must follow"
        )
    best = most_helped(model, ids)
    walk(
        model, tokenizer, ids, best if options.position is None else options.position, options.seed
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a thinking model")
    add("--text", default=TEXT, help="the text; none: two lines of the built-in corpus")
    add("--position", type=int, metavar="J", help="where to think; none: where it helps most")
    add("--seed", type=int, default=0, help="of the thoughts (0)")
    execute(parser, run, arguments)


if __name__ == "__main__":
    main()
