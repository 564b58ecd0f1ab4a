# azure-vnet: containers get their own addresses of the Azure virtual network.
# Copyright (c) The azure-vnet authors. MIT licence.

GO      ?= $(or $(shell command -v go),/usr/local/go/bin/go)
VERSION ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),devel)
PREFIX  ?= /usr/local
native  := $(shell $(GO) env GOHOSTARCH)
ARCH    ?= $(native)

out    := build$(if $(filter-out $(native),$(ARCH)),/$(ARCH))
binary := $(out)/azure-vnet-plugin
plugin := $(out)/plugin

.DEFAULT_GOAL := help

.PHONY: help
help: ## lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##: building

.PHONY: build
build: ## builds the static binaries azure-vnet-plugin and azure-vnetctl in build; ARCH=arm64 for another architecture
	CGO_ENABLED=0 GOARCH=$(ARCH) $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o $(binary) .
	CGO_ENABLED=0 GOARCH=$(ARCH) $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o $(out)/azure-vnetctl ./cmd/azure-vnetctl

.PHONY: cni
cni: ## builds the files of the CNI package, build/cni
	scripts/dist.sh content $(VERSION) $(ARCH) $(out)/cni

.PHONY: rootfs
rootfs: build cni ## builds build/plugin for docker plugin create; iptables comes from Debian packages
	scripts/rootfs.sh $(binary) $(out)/cni $(plugin)/rootfs $(out)/packages $(ARCH)
	cp config.json $(plugin)/config.json

.PHONY: dist
dist: ## builds the CNI package's archives and SHA256SUMS in dist/, one for each of ARCHS; VERSION=v1.0.0 names the release
	scripts/dist.sh archives $(VERSION) dist $(ARCHS)

##: using

.PHONY: plugin
plugin: rootfs ## makes azure-vnet:latest in this machine's engine, disabled; networks and settings stay
	scripts/plugin.sh create $(plugin)

.PHONY: install
install: rootfs ## builds, makes and enables the plugin on this VM
	scripts/plugin.sh install $(plugin) $(binary) $(PREFIX)

.PHONY: push
push: ## pushes the plugin to REGISTRY=host:port/name, a tag for each of ARCHS; TAG=1.2 puts 1.2- before the tags
	@[ -n "$(REGISTRY)" ] || { echo 'make push REGISTRY=host:port/name' >&2; exit 1; }
	for arch in $(or $(ARCHS),amd64 arm64); do $(MAKE) --no-print-directory pushed ARCH=$$arch || exit; done

.PHONY: pushed
pushed: rootfs
	scripts/plugin.sh push $(plugin) $(REGISTRY):$(if $(TAG),$(TAG)-)$(ARCH)

.PHONY: uninstall
uninstall: ## removes the plugin and everything that it made
	scripts/plugin.sh uninstall $(binary) $(PREFIX)

.PHONY: status
status: build ## shows which addresses are lent, attached and known; works without a running plugin
	@$(binary) status

.PHONY: clean
clean: ## removes build/ and dist/
	rm -rf build dist

##: testing

.PHONY: demo
demo: needs rootfs ## runs two simulated VMs whose containers reach each other; KEEP=1 leaves them up
	@$(GO) build -o build/demo ./test/demo
	@KEEP=$(KEEP) build/demo $(plugin)

.PHONY: test
test: needs rootfs ## runs all tests but the long ones, with a real dockerd in namespaces
	scripts/test.sh

.PHONY: soak
soak: needs rootfs ## runs all tests in their whole form, storms for SOAK (10m), and fuzzing; prints its figures
	scripts/soak.sh

.PHONY: fresh
fresh: ## runs make demo and make test on a bare Debian with only Go, git and make
	scripts/fresh.sh

.PHONY: bench
bench: needs ## measures calls, state and packets, beside the reference plugins and from host to host
	$(GO) test -run '^$$' -bench . -benchmem ./pool ./bridge ./internal/statefile
	$(GO) run ./bench

.PHONY: needs
needs:
	@scripts/needs.sh
