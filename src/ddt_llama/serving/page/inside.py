"""What the tab Inside asks of the model, as programs: its tokens shown, swapped and left out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.generation.work import Decode, Encode, Program

SEED = 0  # of the noise that a picture is decoded from, the same for all that are compared
GROUPS = 64  # of tokens that are left out together: one each, of so many

# Tokens are numbered as the page shows them: 1 is the coarsest, the last column of the codes.


def from_first(
    image: Float[Tensor, "3 h w"], counts: Sequence[int], steps: int
) -> Program[Float[Tensor, "n 3 h w"]]:
    """Rebuild a picture from its first tokens, once for each number of them."""
    codes = yield Encode(image[None])
    made = []
    for count in counts:
        made.append((yield Decode(codes, [SEED], steps, count)))
    return torch.cat(made)


def swapped(
    pair: Float[Tensor, "2 3 h w"], first: int, last: int, steps: int
) -> Program[Float[Tensor, "3 3 h w"]]:
    """Rebuild a picture, another one, and the first with tokens `first` to `last` of the other."""
    codes = yield Encode(pair)
    mixed = codes[:1].clone()
    taken = slice(codes.shape[1] - last, codes.shape[1] - first + 1)
    mixed[:, taken] = codes[1:, taken]
    return (yield Decode(torch.cat([codes, mixed]), [SEED] * 3, steps))


def without(
    image: Float[Tensor, "3 h w"], left_out: Sequence[range], steps: int
) -> Program[Float[Tensor, "n 3 h w"]]:
    """Rebuild a picture from all tokens, then without each of these ranges of them."""
    codes = yield Encode(image[None])
    made = [(yield Decode(codes, [SEED], steps))]
    count = codes.shape[1]
    for tokens in left_out:
        kept = tuple(count - place not in tokens for place in range(count))
        made.append((yield Decode(codes, [SEED], steps, kept)))
    return torch.cat(made)


def groups(count: int) -> list[range]:
    """Return the numbers of `count` tokens, one each, or where there are many, several together."""
    each = -(-count // GROUPS)
    return [range(first, min(first + each, count + 1)) for first in range(1, count + 1, each)]
