# `make help` says what there is. Nothing is needed but Go, and Docker for the targets that begin with compose.

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

.DEFAULT_GOAL := help
.PHONY: help
help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build ./wharf
	CGO_ENABLED=0 go build -trimpath -o wharf ./cmd/wharf

.PHONY: demo
demo: ## Run the whole shop in one process
	go run ./cmd/wharf demo

.PHONY: test
test: ## Run all tests
	go test ./...

.PHONY: race
race: ## Run the tests of what is concurrent with the race detector
	go test -race ./commands/... ./infra/kafka ./infra/policies ./infra/web
	go test -race ./infra/journal -seeds 300
	go test -race ./infra/postgres -run 'Token|Wait|Park|Poison|Verif|Rollback|Refused|Replay'

SEEDS ?= 10000
FROM ?= 1
SEED ?= 0

.PHONY: simulate
simulate: ## Attack the journal in simulated worlds (SEEDS=10000 FROM=1, or one of them with its trace: SEED=n)
	go test -count=1 -timeout 0 -v -run '^TestSimulation$$' ./infra/journal -seeds $(SEEDS) -from $(FROM) -seed $(SEED)

.PHONY: mutants
mutants: ## Take each guarantee of the journal away, and see that the tests notice
	go run ./infra/journal/mutants

.PHONY: test-kafka
test-kafka: ## Run the tests of Kafka on Apache Kafka, which it starts (needs Java and Maven)
	WHARF_TEST_APACHE=1 go test -count=1 -p 1 ./infra/embedded/apache ./infra/kafka

ROUNDS ?= 2

.PHONY: torture
torture: ## Kill, pause and restart processes of the shop under load, and count (ROUNDS=2 SEED=0, which is any; Linux)
	go test -tags torture -count=1 -timeout 0 -v -run '^TestTorture$$' ./infra/torture -rounds $(ROUNDS) -seed $(SEED)

INVOICES ?=
ORDERS ?= 0

.PHONY: replays
replays: ## Replay, roll back and verify read models while orders are loaded, and kill projectors and replays (INVOICES=file ORDERS=0, which is all; Linux)
	go test -tags torture -count=1 -timeout 0 -v -run '^TestReplaysUnderLoad$$' ./infra/torture -invoices '$(abspath $(INVOICES))' -orders $(ORDERS) -seed $(SEED)

.PHONY: bench
bench: ## Measure the append path, the read side and Kafka beside their limits, on this machine
	go test -tags bench -count=1 -timeout 0 -v ./infra/bench $(BENCH)
	go test -run '^$$' -bench . -benchtime 1x ./infra/kafka

.PHONY: lint
lint: ## Formatting, vet, staticcheck, the import rule, a tidy and verified go.mod
	@unformatted=$$(gofmt -l cmd commands domain infra projections); \
	if [ -n "$$unformatted" ]; then echo "gofmt would change:"; echo "$$unformatted"; exit 1; fi
	go vet -tags compose,torture,bench ./...
	go run $(STATICCHECK) -tags compose,torture,bench ./...
	go test ./infra
	go mod tidy -diff
	go mod verify

.PHONY: check
check: lint test ## All that has to pass before a commit

# The image is built with modules from where this machine gets them.
compose-up compose-test: export GOPROXY := $(shell go env GOPROXY)
compose-up compose-test: export GOSUMDB := $(shell go env GOSUMDB)

.PHONY: compose-up
compose-up: ## Build and start the shop in containers, at http://127.0.0.1:8080
	docker compose up --build --detach --wait

.PHONY: compose-down
compose-down: ## Stop the containers and forget what they kept
	docker compose down --volumes

.PHONY: compose-test
compose-test: ## Load, scale and kill the shop in containers, then audit it
	go test -tags compose -count=1 -timeout 30m -v ./infra/compose

.PHONY: clean
clean: ## Remove what was built and what a demo kept
	rm -rf wharf .wharf
