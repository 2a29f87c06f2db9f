"""InfLLM sessions for LangChain: a chat model for whole histories, and a Runnable for single events."""

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise ImportError('ChatInfLLM needs langchain-core: pip install "infllm-agent[langchain]"') from error

from infllm_agent.errors import DivergedHistory
from infllm_agent.integrations.langchain.chat_models import ChatInfLLM
from infllm_agent.integrations.langchain.chunks import SessionFull
from infllm_agent.integrations.langchain.messages import SessionInput
from infllm_agent.integrations.langchain.runnables import SessionRunnable

__all__ = ["ChatInfLLM", "DivergedHistory", "SessionFull", "SessionInput", "SessionRunnable"]
