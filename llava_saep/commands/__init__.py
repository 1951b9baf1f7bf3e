"""The subcommands of `llava-saep`, one module each, with `main(argv) -> exit code`."""
