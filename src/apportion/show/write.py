"""Writing files whole or not at all: see `apportion.core.write`."""

from apportion.core.write import atomic, write_bytes

__all__ = ["atomic", "write_bytes"]
