# This builds the plugin's root file system, as `make rootfs` does on Debian or Ubuntu.
# Copyright (c) The azure-vnet authors. MIT licence.
#
# BASE is an image of Debian or Ubuntu with Go and make:
#
#   docker build --build-arg BASE=golang:1.26-bookworm -t azure-vnet-rootfs .
#   mkdir -p build/plugin/rootfs && cp config.json build/plugin/
#   docker export "$(docker create azure-vnet-rootfs x)" | tar -x -C build/plugin/rootfs
#   docker plugin create azure-vnet:latest build/plugin
ARG BASE=golang:1.26-bookworm
FROM ${BASE} AS build
ARG GOPROXY=https://proxy.golang.org,direct
ARG VERSION=devel
WORKDIR /src
COPY . .
RUN make rootfs VERSION=${VERSION}

FROM scratch
COPY --from=build /src/build/plugin/rootfs /
ENTRYPOINT ["/azure-vnet-plugin"]
