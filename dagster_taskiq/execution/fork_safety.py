from __future__ import annotations


class ForkTrial:
    def hazard(self) -> str:
        return ""


def reseed() -> None:
    pass
