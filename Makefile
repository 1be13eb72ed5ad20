# Culvert: build, test, demonstrate, install. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := build

ifeq ($(origin VERSION),undefined)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
endif
IMAGE   ?= culvert-agent:$(VERSION)
GO      ?= go
ARCH    := $(shell $(GO) env GOARCH)
LDFLAGS := -s -w -X github.com/culvert-dev/culvert/internal/version.Version=$(VERSION)
GOBUILD := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)'

# What tests and demo call beside the cluster's own needs: curl, dig, a private
# D-Bus, systemd-analyze, wg-quick. Never systemd-resolved, whose package takes over the
# machine's DNS: tests unpack it into a cache of their own.
TEST_PACKAGES := curl bind9-dnsutils dbus-daemon systemd wireguard-tools

# Steps share bin/ and the machine's network.
.NOTPARALLEL:

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: build
build: binaries cluster image ## everything under bin/, the test cluster's own binaries, the agent image

.PHONY: binaries
binaries: ## bin/culvert, bin/culvertd, bin/culvert-agent
	@mkdir -p bin
	$(GOBUILD) -o bin/culvert ./cmd/culvert
	$(GOBUILD) -o bin/culvertd ./cmd/culvertd
	$(GOBUILD) -o bin/culvert-agent ./cmd/culvert-agent
	@ln -sf culvert bin/kubectl-culvert

.PHONY: cluster
cluster: ## bin/testcluster and what it runs (installs Debian packages that are missing)
	@$(MAKE) --no-print-directory -C test/cluster packages build MORE_PACKAGES="$(TEST_PACKAGES)"

.PHONY: istio
istio: ## Istio's control plane, for tests only
	@$(MAKE) --no-print-directory -C test/cluster istio

.PHONY: image
image: ## dist/culvert-agent.tar: the agent's OCI image for amd64 and arm64, no Docker
	@mkdir -p dist
	GOOS=linux GOARCH=amd64 $(GOBUILD) -o dist/culvert-agent-amd64 ./cmd/culvert-agent
	GOOS=linux GOARCH=arm64 $(GOBUILD) -o dist/culvert-agent-arm64 ./cmd/culvert-agent
	$(GO) run ./deploy/image --bin-amd64 dist/culvert-agent-amd64 --bin-arm64 dist/culvert-agent-arm64 --version $(VERSION) --name $(IMAGE) --out dist/culvert-agent.tar | tee dist/culvert-agent.txt
	@head -n 1 dist/culvert-agent.txt > dist/culvert-agent.name

.PHONY: unit
unit: ## unit and namespace tests
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$unformatted" || { echo "not gofmt'ed: $$unformatted" >&2; exit 1; }
	$(GO) vet -tags e2e,cluster ./...
	$(GO) test ./...

.PHONY: cluster-test
cluster-test: cluster ## the test cluster's own tests: clusters come, break and go
	$(MAKE) --no-print-directory -C test/cluster test CLUSTER=1 MORE_PACKAGES="$(TEST_PACKAGES)"

.PHONY: e2e
e2e: build istio ## the whole product on a real cluster, as ordinary users
	$(GO) test -count=1 -timeout 75m -tags e2e -v ./test/e2e

.PHONY: e2e-labs
e2e-labs: build istio ## the same in two labs side by side: in half the time, but tests about time may fail
	$(GO) test -c -tags e2e -o bin/e2e.test ./test/e2e
	test/e2e/run.sh

.PHONY: test
test: build unit cluster-test e2e ## everything: unit, namespace, cluster and e2e tests

.PHONY: demo
demo: build ## a real cluster, a laptop that joins it, and what it then reaches
	$(GO) run ./test/demo up

.PHONY: demo-down
demo-down: ## end what `make demo` left running
	$(GO) run ./test/demo down

.PHONY: bench
bench: build ## figures beside kubectl, stock wireguard-go and the direct way, in the same run; kept in docs/bench
	$(GO) run ./test/bench

.PHONY: microbench
microbench: ## the parts of the data path alone, with allocations, as root
	$(GO) test -run '^$$' -bench . -benchmem ./tun ./wire/...

.PHONY: clean
clean: ## what was built
	rm -rf bin dist test/cluster/bin test/cluster/images

include deploy/install.mk
