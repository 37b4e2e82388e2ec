"""A process that runs a node's discovery as the node wires it, in whatever network it is started; for test_discovery_network.py.

    python discovering_process.py NODE_ID MESH PORT [SEED...]

Each suggested address, and each change of what is heard, is one line of JSON. Ends, with its goodbye, at the end of its input.
"""

import asyncio
import json
import sys

from tars.core.addresses import own_addresses
from tars.mesh.discovery import Discovery
from tars.mesh.network_interfaces import NetworkWatch
from tars.mesh.seeds import Seeds


def say(**what):
    print(json.dumps(what), flush=True)


class Told(Seeds):
    def discovered(self, key, addresses):
        say(heard=key.partition(".")[0], addresses=list(addresses))
        super().discovered(key, addresses)

    def withdrawn(self, key):
        say(gone=key.partition(".")[0])
        super().withdrawn(key)


async def main(node, mesh, port, *configured):
    watch = NetworkWatch(seconds=0.2)
    seeds = Told(configured, lambda address: say(suggested=address), lambda address: False)
    discovery = Discovery(
        node,
        mesh,
        "0.4.0",
        seeds,
        addresses=lambda: own_addresses("0.0.0.0", int(port), watch.addresses),
        interfaces=lambda: watch.current,
        on_wsl2=lambda: False,
        sweep_seconds=1.0,
    )
    watch.on_change(discovery.refresh)
    watch.on_change(seeds.hurry)
    tasks = [asyncio.create_task(each.run()) for each in (watch, seeds, discovery)]
    say(ready=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


asyncio.run(main(*sys.argv[1:]))
