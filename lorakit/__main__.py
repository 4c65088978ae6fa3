"""``python -m lorakit`` is ``lorakit``."""

from lorakit.cli.main import main

main()
