"""schemathesis over our OpenAPI document: made-up requests by its schemas, and what no answer may be.

    python tests/clients/openapi_cases.py              2,000 cases and more against the API with a scripted engine
    python tests/clients/openapi_cases.py --url http://127.0.0.1:3000 --max-examples 20

No answer may be a 5xx, have a status, a content type or a body that the document does not describe. Ends with 0 when
that holds. schemathesis is installed into an environment of its own.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from environments import clean_environment, python_of

HERE = Path(__file__).parent
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
LEAST_CASES = 2_000


def run(url: str, max_examples: int, seed: int) -> tuple[int, int]:
    """schemathesis' exit status, and the number of cases that it tried."""
    command = [
        str(Path(python_of("schemathesis")).parent / "schemathesis"), "run", f"{url}/openapi.json",
        "--checks", CHECKS, "--max-examples", str(max_examples), "--seed", str(seed), "--no-color",
        "--phases", "examples,coverage,fuzzing", "--mode", "all", "--request-timeout", "60", "--continue-on-failure",
        "--generation-database", "none", "--warnings", "off",
    ]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=clean_environment())
    print(done.stdout[-30_000:], done.stderr[-5_000:])
    counts = re.search(r"([\d,]+) generated", done.stdout)
    return done.returncode, int(counts[1].replace(",", "")) if counts else 0


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--max-examples", type=int, default=100, help="per route and phase")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    server = None
    if asked.url is None:
        server = subprocess.Popen(
            [sys.executable, str(HERE / "scripted_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        url = server.stdout.readline().strip()
    else:
        url = asked.url
    try:
        status, num_cases = run(url, asked.max_examples, asked.seed)
    finally:
        if server is not None:
            server.communicate()
    print(f"{num_cases} cases")
    return status or int(asked.url is None and num_cases < LEAST_CASES)


if __name__ == "__main__":
    sys.exit(main())
