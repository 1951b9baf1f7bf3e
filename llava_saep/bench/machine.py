"""What a measurement ran on, under the name that benchmarks know; evaluations describe theirs in the same way."""

from llava_saep.machine import GIB, describe_machine, machine_line, processor_name

__all__ = ["GIB", "describe_machine", "machine_line", "processor_name"]
