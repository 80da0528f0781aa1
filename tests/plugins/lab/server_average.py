"""The server averages the global model over rounds: a method that works after every round, with a state of its own."""

from mosaic_ray.methods.base import Method


class ServerAverage(Method):
    name = "server_average"

    def after_round(self, ctx, finished):
        """Return the mean of all global models so far; the state holds the running sum of the student's network."""
        name = ctx.client_context.federation.student
        done = finished.round_num + 1
        total = {
            entry: value + finished.state[entry] if finished.state else value
            for entry, value in finished.models[name].items()
        }
        mean = {entry: (value / done).astype(finished.models[name][entry].dtype) for entry, value in total.items()}
        assert [update.client_id for update in finished.updates] == sorted(
            update.client_id for update in finished.updates
        )
        return finished.models | {name: mean}, total


SERVER_AVERAGE = ServerAverage()
