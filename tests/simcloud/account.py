"""moto's server as one AWS account is: five regions are enabled, and machines can be sold out.

    account.py -p PORT     environment: SIMCLOUD_MARK (the cloud's folder)

moto has every region that AWS has, 38 of them, and never lacks a machine. Here RunInstances is
refused while the file `sold-out` is in the cloud's folder, as EC2 refuses it: HTTP 500 and its own
words. Every refusal is a line in the file `refusals`.
"""

import os
import sys
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

ENABLED = ("us-east-1", "us-east-2", "us-west-2", "eu-west-1", "ap-northeast-1")
REFUSAL = """<?xml version="1.0" encoding="UTF-8"?>
<Response><Errors><Error><Code>InsufficientInstanceCapacity</Code><Message>We currently do not \
have sufficient {machine} capacity in the Availability Zone you requested ({zone}). Our system \
will be working on provisioning additional capacity. You can currently get {machine} capacity by \
not specifying an Availability Zone in your request or choosing {other}.</Message></Error></Errors>\
<RequestID>5a5a5a5a-0000-4000-8000-000000000000</RequestID></Response>"""

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def selling_out(application: Application, folder: Path) -> Application:
    """The application, of which RunInstances finds no machine while `folder` says so."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not (folder / "sold-out").exists() or environ["REQUEST_METHOD"] != "POST":
            return application(environ, start_response)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = BytesIO(body)
        asked = parse_qs(body.decode(errors="replace"))
        if asked.get("Action") != ["RunInstances"]:
            return application(environ, start_response)
        machine = asked.get("InstanceType", ["?"])[0]
        region = environ["HTTP_AUTHORIZATION"].split("/")[2]
        zone = asked.get("Placement.AvailabilityZone", [f"{region}a"])[0]
        with (folder / "refusals").open("a") as file:
            file.write(f"{machine} {zone}\n")
        start_response("500 Internal Server Error", [("Content-Type", "text/xml;charset=UTF-8")])
        return [REFUSAL.format(machine=machine, zone=zone, other=f"{region}b").encode()]

    return answer


if __name__ == "__main__":
    from moto import server
    from moto.ec2.models.availability_zones_and_regions import RegionsAndZonesBackend

    regions = RegionsAndZonesBackend.regions
    RegionsAndZonesBackend.regions = [each for each in regions if each.name in ENABLED]
    folder, dispatcher = Path(os.environ["SIMCLOUD_MARK"]), server.DomainDispatcherApplication
    server.DomainDispatcherApplication = lambda create: selling_out(dispatcher(create), folder)
    server.main(sys.argv[1:])
