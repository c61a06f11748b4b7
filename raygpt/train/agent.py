"""What a local Ray starts for its dashboard's agent, which nobody needs: waits for its end.

Ray ends when its agent does, so there must be one.
"""

import os
import time

CHECK_SECONDS = 1.0


def main() -> None:
    raylet = int(os.environ["RAY_RAYLET_PID"])
    while os.getppid() == raylet:
        time.sleep(CHECK_SECONDS)


if __name__ == "__main__":
    main()
