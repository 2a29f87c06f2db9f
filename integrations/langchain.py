"""InfLLM sessions for LangChain: a chat model for whole histories, and a Runnable for single events."""

from infllm_agent.integrations.calls import SessionFull
from infllm_agent.integrations.chat_model import ChatInfLLM
from infllm_agent.integrations.desk import DivergedHistory
from infllm_agent.integrations.session_runnable import SessionRunnable
from infllm_agent.integrations.turns import SessionInput

__all__ = ["ChatInfLLM", "DivergedHistory", "SessionFull", "SessionInput", "SessionRunnable"]
