"""An agent in ten lines, which looks at its answer twice: `rollout.agent: {type: command, command: [python, any_agent.py]}`.

The client finds the endpoint's address and its key in the environment, as it does everywhere; the task is on stdin.
"""

import json
import sys

from openai import OpenAI

task, client = json.load(sys.stdin), OpenAI()
limit = {"max_tokens": int(sys.argv[1])} if len(sys.argv) > 1 else {}
messages = task["messages"]
for check in ("Look at it again, then give the answer once more.", None):
    said = client.chat.completions.create(model=task["model"], messages=messages, **limit).choices[0].message
    messages = [*messages, {"role": "assistant", "content": said.content}, {"role": "user", "content": check}]
print(said.content)
