"""`sky api start`, then `sky launch --dryrun` several times: SkyPilot takes seconds to import.

dryrun.py JSON     a list of lists of words; prints what each says, SEPARATOR between them
"""

import json
import sys

SEPARATOR = "\f"

if __name__ == "__main__":
    from sky.client.cli.command import cli

    cli.main(["api", "start"], standalone_mode=False)
    sys.stdout.write(SEPARATOR)
    for words in json.loads(sys.argv[1]):
        cli.main(["launch", "--dryrun", "-y", *words], standalone_mode=False)
        sys.stdout.write(SEPARATOR)
