"""
The law of scaling: loss over size is fitted, and a larger size foretold with its interval.

L = E + A N^-a, with one exponent a, an A for each length, and an E for each seed and length: what all sizes of a seed
share, such as the luck of its images, drops out. With two lengths the joint law's B D^-b is no more than the
difference of their E. Sizes N [R] are numbers of weights; losses [S, R, L] are of S seeds, R sizes and L lengths.
"""
import math

import numpy as np

EXPONENTS = np.geomspace(.02, 2, 200)       # that are tried


def size_term(N, a, A, unit):
    """A N^-a, N counted in units of the middle of `unit` [R]. N [n], a [...], A [..., L] -> [..., n, L]."""
    middle = np.exp(np.log(unit).mean())
    N = np.atleast_1d(N) / middle
    x = N ** -np.asarray(a)[..., None]                                  # [..., n]
    return x[..., :, None] * A[..., None, :]


def fit(N, losses):
    """Least squares by variable projection: for every exponent tried the rest is linear, and is solved exactly.
    N [R], losses [..., S, R, L] -> a [...], A [..., L], never negative: size does not hurt."""
    ones = np.ones((len(EXPONENTS), 1))
    x = size_term(N, EXPONENTS, ones, N)[..., 0]                        # [P, R]
    x = x - x.mean(1, keepdims=True)                                    # E takes the mean over sizes
    y = losses.mean(-3)                                                 # [..., R, L]
    y = y - y.mean(-2, keepdims=True)

    # the A of each exponent and length, and by how much it lowers the squared error
    products = np.einsum('pr,...rl->...pl', x, y)
    squares = (x ** 2).sum(1)[:, None]                                  # [P, 1]
    slopes = (products / squares).clip(min=0)
    gain = 2 * slopes * products - slopes ** 2 * squares
    best = gain.sum(-1).argmax(-1)                                      # [...]
    A = np.take_along_axis(slopes, best[..., None, None], axis=-2)[..., 0, :]
    return EXPONENTS[best], A


def residuals(N, losses, a, A):
    """What the law leaves of each run: [S, R, L]."""
    rest = losses - size_term(N, a, A, N)
    return rest - rest.mean(1, keepdims=True)


def bootstrap(N, losses, draws=2000):
    """(a [1 + draws], A [1 + draws, L], luck [S * R, L]): the fit; fits to what other luck would have given; the
    luck of single runs. A run's lengths share their luck and stay together."""
    S, R, L = losses.shape
    a, A = fit(N, losses)
    rest = residuals(N, losses, a, A)
    freedom = S * (R - 1) - 1.5                                         # of each length: its E, A, and half of a
    luck = rest.reshape(S * R, L) * math.sqrt(S * R / freedom)

    # few runs tell little of how large luck is: Student's t instead of a normal deviate
    rng = np.random.default_rng(0)
    stretch = np.sqrt(freedom / rng.chisquare(freedom, draws))
    others = luck[rng.integers(S * R, size=(draws, S, R))]              # [draws, S, R, L]
    again = fit(N, losses - rest + others * stretch[:, None, None, None])
    all_a = np.concatenate(([a], again[0]))
    all_A = np.concatenate((A[None], again[1]))
    return all_a, all_A, luck


def forecast(N, losses, N_new, seeds, draws=2000):
    """By how much the new size's loss will differ from the largest's, the mean over so many shared seeds:
    (differences [L], low [L], high [L]), 90%, of the fit's uncertainty and of both sizes' luck."""
    a, A, luck = bootstrap(N, losses, draws)
    both = size_term([max(N), N_new], a, A, N)                          # [1 + draws, 2, L]
    difference = both[:, 1] - both[:, 0]

    rng = np.random.default_rng(1)
    picked = luck[rng.integers(len(luck), size=(2, draws, seeds))].mean(2)      # [2, draws, L]
    likely = difference[1:] + picked[1] - picked[0]
    low, high = np.quantile(likely, (.05, .95), axis=0)
    return difference[0], low, high


def expected_width(N, N_new, pair, drop, deviation, seeds, new_seeds, a=.3, tries=40):
    """How wide the forecast's interval will be, if the law holds: a share of the drop from the pair's first size to
    the largest, [L]. pair: two N; drop [L]: from the first to the second; deviation [L]: of single runs."""
    rng = np.random.default_rng(0)
    x = N ** -a
    first, second = [size ** -a for size in pair]
    A = drop / (first - second)
    shares = []
    for _ in range(tries):
        luck = rng.normal(size=(seeds, len(N), len(drop))) * deviation
        _, low, high = forecast(N, x[:, None] * A + luck, N_new, new_seeds, draws=300)
        shares.append((high - low) / (A * (first - x[-1])))
    return np.mean(shares, axis=0)
