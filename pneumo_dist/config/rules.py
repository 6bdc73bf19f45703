"""The error for an invalid setting, and the checks that raise it. Each message says what, where and what to do."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake in the user's input: one line saying what, where and what to do (exit status 2)."""


def require(ok: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Require one of the listed values."""
    require(value in choices, f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")


def fraction(name: str, value: float) -> None:
    """Require a number from 0 to 1."""
    require(0.0 <= value <= 1.0, f"{name}={value} must be between 0 and 1")


def at_least(low: int, prefix: str, section: object, *names: str) -> None:
    """Require that the named fields of a section are at least `low`."""
    for name in names:
        value = getattr(section, name)
        require(value >= low, f"{prefix}.{name}={value} must be at least {low}")
