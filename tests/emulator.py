"""Google's storage over loopback: `python emulator.py PORT FOLDER`, which keeps in the folder what is written.

What the emulator lacks and TensorStore needs of the real service is added: reads say the object's generation, and a
write with a condition on it fails where it does not hold.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def read(handler):
    def answer(request, response, storage, *args, **kwargs):
        handler(request, response, storage, *args, **kwargs)
        found = generation(storage, request.params["bucket_name"], request.params["object_id"])
        if found != "0":
            response["x-goog-generation"] = found

    return answer


def write(request, response, storage, *args, **kwargs):
    wanted, name = request.query.get("ifGenerationMatch"), request.query.get("name")
    if wanted and name and generation(storage, request.params["bucket_name"], name[0]) != wanted[0]:
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    insert(request, response, storage, *args, **kwargs)


insert = objects.insert
replaced = {objects.download: read(objects.download), objects.get: read(objects.get), insert: write}
for _, methods in server.HANDLERS:
    methods.update({method: replaced.get(handler, handler) for method, handler in methods.items()})
port, folder = sys.argv[1:]
server.create_server("127.0.0.1", int(port), in_memory=False, data_dir=folder, default_bucket="bucket1").run()
