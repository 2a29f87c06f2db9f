"""InfLLM sessions for LangChain: a chat model for whole histories, and a Runnable for single events."""

from infllm_agent.errors import DivergedHistory
from infllm_agent.integrations.langchain.chat_models import ChatInfLLM
from infllm_agent.integrations.langchain.runnables import SessionRunnable
from infllm_agent.routing.calls import SessionFull
from infllm_agent.routing.turns import SessionInput

__all__ = ["ChatInfLLM", "DivergedHistory", "SessionFull", "SessionInput", "SessionRunnable"]
