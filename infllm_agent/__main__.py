"""``python -m infllm_agent`` is ``infllm-agent``."""

import sys

from infllm_agent.cli.app import main

sys.exit(main())
