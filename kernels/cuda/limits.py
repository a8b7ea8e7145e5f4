"""What an NVIDIA GPU has room for, known or measured."""

from dataclasses import dataclass, replace

__all__ = ["KNOWN", "DeviceLimits", "known_limits"]


@dataclass(frozen=True)
class DeviceLimits:
    """What the choice of a configuration has to know of a GPU.

    Attributes:
        arch: the architecture's name, such as "sm_90".
        multiprocessors: how many of them a launch may use.
        shared_bytes: shared memory that one block may ask for.
        max_cluster: blocks of the largest cluster; 1 where there are no clusters.
    """

    arch: str
    multiprocessors: int
    shared_bytes: int
    max_cluster: int

    @property
    def capability(self) -> int:
        """The compute capability as a number: 90 for "sm_90"."""
        digits = self.arch.removeprefix("sm_").rstrip("af")
        return int(digits) if self.arch.startswith("sm_") and digits.isdigit() else 0


# One well-known GPU of each architecture: A100, RTX 3090 Ti, RTX 4090, H100, B200, RTX 5090.
KNOWN = {
    limits.arch: limits
    for limits in (
        DeviceLimits("sm_80", 108, 163 * 1024, 1),
        DeviceLimits("sm_86", 84, 99 * 1024, 1),
        DeviceLimits("sm_89", 128, 99 * 1024, 1),
        DeviceLimits("sm_90", 132, 227 * 1024, 16),
        DeviceLimits("sm_100", 148, 227 * 1024, 16),
        DeviceLimits("sm_120", 170, 99 * 1024, 8),
    )
}


def known_limits(arch: str) -> DeviceLimits:
    """The limits of an architecture's well-known GPU; of another one, those of an older one.

    Args:
        arch: such as "sm_90"; "sm_90a" is the same.
    """
    limits = DeviceLimits(arch, 0, 0, 1)
    older = [known for known in KNOWN.values() if known.capability <= limits.capability]
    nearest = older[-1] if older else KNOWN["sm_86"]
    # Within a generation the later ones are the smaller GPUs: what all of them have.
    same_generation = nearest.capability // 10 == limits.capability // 10
    if nearest.capability != limits.capability and not same_generation:
        nearest = replace(nearest, shared_bytes=min(nearest.shared_bytes, 99 * 1024), max_cluster=1)
    return replace(nearest, arch=f"sm_{limits.capability}" if limits.capability else arch)
