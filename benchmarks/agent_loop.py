"""An agent of many steps, each with a tool result of about 1,000 tokens: what a step costs as the history grows.

    python benchmarks/agent_loop.py [--steps 30] [--json OUT]

The agent is LangChain's ``create_agent``; every step is made to call the tool, and after the last one it answers. For
each step: the tokens that went through the model beside those of its new messages, and the seconds. Beside it, at some
steps, the same history read by plain transformers, which keep nothing between calls.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool

from infllm_agent.bench.retrieval.readers import FullContext
from infllm_agent.integrations.langchain import ChatInfLLM

HOSTS = ("db-1", "db-2", "web-1", "web-2", "queue-1")
PLAIN_AT = (3, 10, 20)


def log_lines(rng: random.Random, count: int) -> str:
    return "\n".join(
        f"{rng.randrange(24):02}:{rng.randrange(60):02} {rng.choice(HOSTS)} request {rng.randrange(10**6)} took "
        f"{rng.randrange(2000)} ms, status {rng.choice((200, 200, 404, 503))}"
        for _ in range(count)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--lines", type=int, default=34, help="of a tool result; 34 are about 1,000 tokens of SmolLM2's"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = random.Random(0)
    steps: list[dict[str, float]] = []

    @tool
    def read_log(host: str) -> str:
        """The latest lines of a host's log."""
        return log_lines(rng, options.lines)

    with tempfile.TemporaryDirectory() as root:
        llm = ChatInfLLM(model=options.model, root=root, max_tokens=32)

        @wrap_model_call
        def measured(request, handler):
            if len(steps) == options.steps:
                return handler(request.override(tool_choice="none"))
            began = time.perf_counter()
            response = handler(request.override(tool_choice="read_log"))
            seconds = time.perf_counter() - began
            usage = response.result[0].usage_metadata
            details = usage["input_token_details"]
            known = steps[-1]["history"] if steps else 0
            steps.append(
                {
                    "step": len(steps) + 1,
                    "history": usage["input_tokens"] + usage["output_tokens"],
                    "new": usage["input_tokens"] - known,  # messages since the answer before it
                    "prefilled": details["cache_creation"],
                    "written": usage["output_tokens"],
                    "seconds": round(seconds, 2),
                }
            )
            print(steps[-1], flush=True)
            return response

        agent = create_agent(llm, [read_log], middleware=[measured])
        thread: RunnableConfig = {"configurable": {"thread_id": "loop"}, "recursion_limit": 4 * options.steps}
        agent.invoke({"messages": [HumanMessage("Watch the logs, one host after the other.")]}, thread)
        session = llm.opened().session("loop")
        ids, model = session.token_ids(), session.model
        for step in (step for step in steps if step["step"] in PLAIN_AT):
            context = FullContext(model)
            began = time.perf_counter()
            context.feed(ids[: int(step["history"] - step["written"])])
            for token in ids[int(step["history"] - step["written"]) : int(step["history"])][:-1]:
                context.feed([token])
            step["plain_seconds"] = round(time.perf_counter() - began, 2)
            print(f"step {step['step']} by plain transformers: {step['plain_seconds']} s", flush=True)
        llm.close()
    by_step = {step["step"]: step["seconds"] for step in steps}
    summary = {
        "seconds, last step / step 3": round(by_step[options.steps] / by_step[3], 2),
        "most tokens prefilled beyond the new ones": max(step["prefilled"] - step["new"] for step in steps),
    }
    print(summary)
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
