"""The calls about datasets. Their files go over HTTP; see beaker_server.http."""

from __future__ import annotations

import hashlib

import grpc
from beaker import beaker_pb2 as pb2

from beaker_server.state import USER, Dataset, State, now


class DatasetCalls(State):
    def make_dataset(self, name: str) -> Dataset:
        key = self._name("dataset")
        folder = self.folder / "datasets" / key
        folder.mkdir(parents=True)
        made = pb2.Dataset(id=key, name=name, full_name=f"{USER}/{name}", created=now())
        self.datasets[key] = Dataset(made, folder)
        return self.datasets[key]

    def find_dataset(self, name: str) -> Dataset | None:
        return self.datasets.get(name) or next(
            (d for d in self.datasets.values() if d.message.full_name == name or d.message.name == name), None
        )

    def ResolveDatasetName(self, request, context):
        self._begin("ResolveDatasetName", context)
        found = self.find_dataset(f"{request.author_name}/{request.dataset_name}")
        if found is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such dataset")
        return pb2.ResolveDatasetNameResponse(dataset_id=found.message.id)

    def GetDataset(self, request, context):
        self._begin("GetDataset", context)
        found = self.datasets.get(request.dataset_id)
        if found is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such dataset")
        return pb2.GetDatasetResponse(dataset=found.message)

    def DeleteDatasets(self, request, context):
        self._begin("DeleteDatasets", context)
        for key in request.dataset_ids:
            self.datasets.pop(key, None)
        return pb2.DeleteDatasetsResponse()

    def ListDatasetFiles(self, request, context):
        self._begin("ListDatasetFiles", context)
        root = self.datasets[request.options.dataset_id].folder
        sha256 = pb2.DatasetFile.ALGORITHM_TYPE_SHA256
        digest = pb2.DatasetFile.DESCRIPTOR.nested_types_by_name["Digest"]._concrete_class
        files = []
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name, data = path.relative_to(root).as_posix(), path.read_bytes()
            if name.startswith(request.options.prefix):
                value = digest(algorithm=sha256, value=hashlib.sha256(data).digest())
                files.append(pb2.DatasetFile(path=name, size=len(data), digest=value))
        return pb2.ListDatasetFilesResponse(dataset_files=files)
