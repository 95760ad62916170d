"""Exercises of notebook 06: where a prompt lies, what a defence wins, what chance does."""

import numpy as np
import torch

from exercises.judging import Case, Exercise, Mistake


def place_along(h: torch.Tensor, complied: torch.Tensor, refused: torch.Tensor) -> torch.Tensor:
    """Where activations (prompt, width) lie along the rejection direction, shape (prompt,).

    `complied` and `refused` (width,) are the means of the two classes: the first lies at 0, the second at 1.
    """
    v = refused - complied
    return (h - complied) @ v / (v @ v)


def phi(plain: np.ndarray, jailbroken: np.ndarray, steered: np.ndarray) -> float:
    """The share of the jailbreak's effect that steering takes back; log-odds of complying, shape (pair,).

    0: nothing gained; 1: the steered jailbroken prompt is answered like the plain one.
    """
    return float(1 - (plain - steered).mean() / (plain - jailbroken).mean())


def rank_p(fitted: float, random: np.ndarray) -> float:
    """The share of all directions that do at least as well as the fitted one, which is one of them.

    `random`, of shape (draw,), does not hold the fitted one. A larger value is better.
    """
    return (1 + int((random >= fitted).sum())) / (len(random) + 1)


H = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 5.0], [5.0, 0.0]])
COMPLIED, REFUSED = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0])
PLAIN, BROKEN, STEERED = np.array([-4.0, -3.0]), np.array([2.0, -1.0]), np.array([-3.2, -2.2])
PUSHED_PAST = np.array([-6.0, -5.0])
RANDOM = np.array([0.1, -0.5, 0.9, 0.3, 0.2, -0.9, 0.5, 0.0, 0.4])


EXERCISES = (
    Exercise(
        "06-1",
        "A map with two landmarks",
        2,
        8,
        "Write `place_along`, the position of a prompt from which AdaSteer reads how strongly to steer it: 0 at the mean of the "
        "class that complied, 1 at the mean of the class that refused.",
        "Subtract the mean of the class that complied, project on $v$ = refused − complied, and divide by "
        "$v \\cdot v$.",
        place_along,
        (Case((H, COMPLIED, REFUSED), torch.tensor([0.0, 1.0, 0.5, 2.0])),),
        (
            Mistake(
                "the origin is missing: subtract the mean of the class that complied before projecting",
                lambda h, c, r: h @ (r - c) / ((r - c) @ (r - c)),
            ),
            Mistake(
                "divide by |v|², not by |v|: as it is, the class that refused lies at |v| and not at 1",
                lambda h, c, r: (h - c) @ (r - c) / (r - c).norm(),
            ),
            Mistake(
                "the projection without a unit: divide by |v|², so that the two classes lie at 0 and 1",
                lambda h, c, r: (h - c) @ (r - c),
            ),
            Mistake(
                "the origin is the wrong class: 0 belongs to the class that complied",
                lambda h, c, r: (h - r) @ (r - c) / ((r - c) @ (r - c)),
            ),
            Mistake(
                "the vector points the wrong way: from the class that complied to the one that refused",
                lambda h, c, r: (h - c) @ (c - r) / ((r - c) @ (r - c)),
            ),
            Mistake(
                "a cosine is no position: it forgets how far along the vector the prompt lies",
                lambda h, c, r: torch.cosine_similarity(h - c, (r - c)[None]),
            ),
            Mistake(
                "a distance is no position: what lies beside the vector must not count",
                lambda h, c, r: (h - c).norm(dim=1) / (r - c).norm(),
            ),
            Mistake(
                "the direction is turned round: 0 is the class that complied, 1 the one that refused",
                lambda h, c, r: place_along(h, r, c),
            ),
        ),
    ),
    Exercise(
        "06-2",
        "Would any direction do?",
        2,
        8,
        "Write `rank_p`, the p-value of the fitted direction among random ones of the same length: the share of all directions, "
        "the fitted one among them, that do at least as well. The values say how much each lowers the log-odds of complying.",
        "With nine draws, p can be 1/10, 2/10, ...: never 0.",
        rank_p,
        (Case((0.9, RANDOM), 0.2), Case((2.0, RANDOM), 0.1), Case((-0.7, RANDOM), 0.9)),
        (
            Mistake(
                "off by one: the fitted direction is itself one of the draws, (1 + number) / (n + 1), so p is never 0",
                lambda f, r: float((r >= f).mean()),
            ),
            Mistake(
                "off by one: the fitted direction counts in the denominator as well, n + 1",
                lambda f, r: (1 + int((r >= f).sum())) / len(r),
            ),
            Mistake(
                "two-sided: a random direction that is as strong the *other* way is no rival of a defence",
                lambda f, r: (1 + int((np.abs(r) >= abs(f)).sum())) / (len(r) + 1),
            ),
            Mistake(
                "ties count against the method: >= and not >", lambda f, r: (1 + int((r > f).sum())) / (len(r) + 1)
            ),
            Mistake(
                "the wrong tail: count the random directions that do at least as *well*",
                lambda f, r: (1 + int((r <= f).sum())) / (len(r) + 1),
            ),
        ),
    ),
    Exercise(
        "06-3",
        "How much of the jailbreak is undone?",
        1,
        8,
        "Write `phi`. On which side of 1 does a defence lie after which jailbroken prompts are refused even more surely than "
        "plain ones, which stand in a neutral wrapper?",
        "One minus the gap that is left over the gap that was there, each averaged over pairs first. A gap keeps its sign.",
        phi,
        (Case((PLAIN, BROKEN, STEERED), 0.8), Case((PLAIN, BROKEN, PUSHED_PAST), 1.5)),
        (
            Mistake(
                "mean of ratios instead of ratio of means: average the gaps over pairs, then divide once",
                lambda p, j, s: float((1 - (p - s) / (p - j)).mean()),
            ),
            Mistake(
                "that is the gap that is *left*: phi is one minus it",
                lambda p, j, s: float((p - s).mean() / (p - j).mean()),
            ),
            Mistake(
                "the sign of the gap is lost: a defence that pushes past the plain prompts has phi above 1",
                lambda p, j, s: float(1 - abs((p - s).mean()) / abs((p - j).mean())),
            ),
            Mistake(
                "phi was held at 1: a defence that pushes past the plain prompts lies above it, and that should be seen",
                lambda p, j, s: float(np.clip(1 - (p - s).mean() / (p - j).mean(), 0, 1)),
            ),
            Mistake(
                "what was gained is measured against the plain outcome itself: divide by the gap plain minus jailbroken",
                lambda p, j, s: float((s - j).mean() / p.mean()),
            ),
        ),
    ),
)
