"""Random numbers without a generator: functions of counters, the same on every device."""

from torch import Tensor


def uniforms(seeds: Tensor, choices: Tensor, positions: Tensor, lanes: Tensor | int = 0) -> Tensor:
    """float64 in the open (0, 1): a pure function of four int64 counters, which broadcast. `lanes`
    tells the numbers of one position apart. No generator, so nothing to save, send or resume.

    Each counter is absorbed by one step of SplitMix64 (Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014; finaliser: Stafford's Mix13) in wrap-around
    int64, so CPU and GPU agree bit for bit. Not for cryptography.
    """
    state = splitmix64(seeds)
    for counter in (choices, positions, lanes):
        state = splitmix64(state ^ counter)
    return (_shift_right(state, 12).double() + 0.5) * 2.0**-52  # exact; neither 0 nor 1


def splitmix64(state: Tensor) -> Tensor:
    """The output of SplitMix64 after `state`, as int64: one step of the generator."""
    z = state - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15, the golden ratio, modulo 2**64
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shifts zeros in from the left; torch's >> on int64 copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
