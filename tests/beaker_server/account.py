"""The calls about a user's account: organization, workspace, budget, images, clusters, secrets."""

from __future__ import annotations

import grpc
from beaker import beaker_pb2 as pb2

from beaker_server.state import BUDGET, ORG, USER, WORKSPACE, State, now


class AccountCalls(State):
    def GetUser(self, request, context):
        self._begin("GetUser", context)
        return pb2.GetUserResponse(user=pb2.User(id="01USER", name=USER))

    def GetOrganization(self, request, context):
        self._begin("GetOrganization", context)
        return pb2.GetOrganizationResponse(organization=pb2.Organization(id="01ORG", name=ORG))

    def ResolveOrganizationName(self, request, context):
        self._begin("ResolveOrganizationName", context)
        return pb2.ResolveOrganizationNameResponse(organization_id="01ORG")

    def ResolveWorkspaceName(self, request, context):
        self._begin("ResolveWorkspaceName", context)
        if (request.owner_name, request.workspace_name) != (ORG, WORKSPACE):
            context.abort(grpc.StatusCode.NOT_FOUND, "no such workspace")
        return pb2.ResolveWorkspaceNameResponse(workspace_id="01WORKSPACE")

    def GetWorkspace(self, request, context):
        self._begin("GetWorkspace", context)
        return pb2.GetWorkspaceResponse(workspace=pb2.Workspace(id="01WORKSPACE", name=f"{ORG}/{WORKSPACE}"))

    def ResolveBudgetName(self, request, context):
        self._begin("ResolveBudgetName", context)
        if f"{request.organization_name}/{request.budget_name}" != BUDGET:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such budget")
        return pb2.ResolveBudgetNameResponse(budget_id="01BUDGET")

    def ResolveImageName(self, request, context):
        self._begin("ResolveImageName", context)
        if f"{request.author_name}/{request.image_name}" not in self.images:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such image")
        return pb2.ResolveImageNameResponse(image_id="01IMAGE")

    def GetImage(self, request, context):
        self._begin("GetImage", context)
        return pb2.GetImageResponse(image=pb2.Image(id=request.image_id))

    def ListClusters(self, request, context):
        self._begin("ListClusters", context)
        shape = pb2.Cluster.DESCRIPTOR.fields_by_name["node_shape"].message_type._concrete_class
        return pb2.ListClustersResponse(clusters=[
            pb2.Cluster(id=f"01{n}", name=n.partition("/")[2], organization_name=ORG,
                        node_shape=shape(gpu_count=g, gpu_type=pb2.GpuType.GPU_TYPE_NVIDIA_H100))
            for n, g in self.clusters.items()])  # fmt: skip

    def _node(self, host: str) -> pb2.Node:
        node = pb2.Node(id=f"01NODE-{host}", hostname=host, cluster_id=f"01{self.nodes[host]}")
        if host in self.cordoned:
            node.cordon_details.cordoned.CopyFrom(now())
        return node

    def ListNodes(self, request, context):
        self._begin("ListNodes", context)
        there = [host for host, cluster in self.nodes.items() if request.options.cluster_id in ("", f"01{cluster}")]
        return pb2.ListNodesResponse(nodes=[self._node(host) for host in there])

    def GetNode(self, request, context):
        self._begin("GetNode", context)
        return pb2.GetNodeResponse(node=self._node(request.node_id.removeprefix("01NODE-")))

    def GetSecret(self, request, context):
        self._begin("GetSecret", context)
        if request.secret_name not in self.secrets:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such secret")
        return pb2.GetSecretResponse(secret=pb2.Secret(name=request.secret_name))

    def ListSecrets(self, request, context):
        self._begin("ListSecrets", context)
        return pb2.ListSecretsResponse(secrets=[pb2.Secret(name=n) for n in sorted(self.secrets)])
