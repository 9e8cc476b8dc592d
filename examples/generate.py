"""A minimal client: one prompt, one adapter, the answer as it is produced.

Start a fleet (`make run`), then: `python examples/generate.py 127.0.0.1:50051 reverse "streams>"`
"""

import sys

from loraplex import Client, LoraplexError


def main(address: str, adapter: str, prompt: str) -> int:
    with Client(address) as client:
        names = [model.adapter_id or "(base)" for model in client.models()]
        print("serves", ", ".join(names))
        try:
            for delta in client.stream(prompt, adapter, temperature=0.0, max_tokens=64):
                print(delta.text, end="", flush=True)
                if delta.usage:
                    print(f"\n{delta.usage.completion_tokens} tokens, seed {delta.seed}")
        except LoraplexError as error:
            print(f"refused: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: python examples/generate.py HOST:PORT ADAPTER PROMPT")
    raise SystemExit(main(*sys.argv[1:]))
