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
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##: building

.PHONY: build
build: ## the static binary, build/azure-vnet-plugin; ARCH=arm64 for another architecture
	CGO_ENABLED=0 GOARCH=$(ARCH) $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o $(binary) .

.PHONY: cni
cni: ## the files of the CNI package, build/cni
	scripts/dist.sh content $(VERSION) $(ARCH) $(out)/cni

.PHONY: rootfs
rootfs: build cni ## build/plugin, ready for docker plugin create; iptables comes from Debian packages
	scripts/rootfs.sh $(binary) $(out)/cni $(plugin)/rootfs $(out)/packages $(ARCH)
	cp config.json $(plugin)/config.json

.PHONY: dist
dist: ## VERSION=v1.0.0: the CNI package's archives and SHA256SUMS, dist/
	scripts/dist.sh archives $(VERSION) dist

##: using

.PHONY: plugin
plugin: rootfs ## azure-vnet:latest in the engine at hand, disabled; its networks and settings stay
	scripts/plugin.sh create $(plugin)

.PHONY: install
install: rootfs ## build, create and enable the plugin on this VM
	scripts/plugin.sh install $(plugin) $(binary) $(PREFIX)

.PHONY: push
push: ## REGISTRY=host:port/name: the plugin to a registry, a tag for each of ARCHS; TAG=1.2 puts 1.2- before it
	@[ -n "$(REGISTRY)" ] || { echo 'make push REGISTRY=host:port/name' >&2; exit 1; }
	for arch in $(or $(ARCHS),amd64 arm64); do $(MAKE) --no-print-directory pushed ARCH=$$arch || exit; done

.PHONY: pushed
pushed: rootfs
	scripts/plugin.sh push $(plugin) $(REGISTRY):$(if $(TAG),$(TAG)-)$(ARCH)

.PHONY: uninstall
uninstall: ## remove the plugin and all that it made
	scripts/plugin.sh uninstall $(binary) $(PREFIX)

.PHONY: status
status: build ## what is lent, attached and known; works while the plugin is dead
	@$(binary) status

.PHONY: clean
clean: ## remove build/ and dist/
	rm -rf build dist

##: proving

.PHONY: demo
demo: needs rootfs ## two simulated VMs whose containers talk by VNet addresses; KEEP=1 leaves them up
	@$(GO) build -o build/demo ./test/demo
	@KEEP=$(KEEP) build/demo $(plugin)

.PHONY: test
test: needs rootfs ## everything, with a real dockerd in namespaces; one summary, one exit status
	scripts/test.sh

.PHONY: soak
soak: needs rootfs ## what takes longer: crashes at random for SOAK (10m), and fuzzing
	scripts/soak.sh

.PHONY: fresh
fresh: ## make demo and make test on a bare Debian that has only Go, git and make
	scripts/fresh.sh

.PHONY: bench
bench: needs ## what calls, state and the wire cost, beside the reference plugins and host to host
	$(GO) test -run '^$$' -bench . -benchmem ./pool ./bridge ./internal/statefile
	$(GO) run ./bench

.PHONY: needs
needs:
	@scripts/needs.sh
