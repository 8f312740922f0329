// Command wharf is every program of the shop: one binary, a subcommand each. It answers the question "how do the
// parts make a running system?"; each file here is one program, one straight page. Read orders.go for a service and
// demo.go for all of it in one process; program.go has what they share.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"wharf/infra/telemetry"
)

type cli struct {
	Demo demoCmd `cmd:"" help:"Run the whole shop in one process, with nothing to install."`

	Orders          ordersCmd          `cmd:"" group:"Services" help:"Run the orders service."`
	Inventory       inventoryCmd       `cmd:"" group:"Services" help:"Run the inventory service."`
	Payments        paymentsCmd        `cmd:"" group:"Services" help:"Run the payments service."`
	Shipping        shippingCmd        `cmd:"" group:"Services" help:"Run the shipping service."`
	Projector       projectorCmd       `cmd:"" group:"Services" help:"Keep the read models in Postgres up to date."`
	Query           queryCmd           `cmd:"" group:"Services" help:"Serve the query API."`
	PaymentProvider paymentProviderCmd `cmd:"" group:"Services" help:"Run the stand-in for an external payment provider."`

	Topics      topicsCmd      `cmd:"" group:"Operations" help:"Create and check the topics."`
	Replay      replayCmd      `cmd:"" group:"Operations" help:"Build read models anew from the log, compare them with the live ones, and swap them in; or roll back."`
	Verify      verifyCmd      `cmd:"" group:"Operations" help:"Compare the live read models with the fold of the log, row by row; exit 1 when one differs."`
	Project     projectCmd     `cmd:"" group:"Operations" help:"Print a row of a read model as it was at a time or a position."`
	Parked      parkedCmd      `cmd:"" group:"Operations" help:"See, retry or give up events that could not be applied to a read model."`
	Projections projectionsCmd `cmd:"" group:"Operations" help:"Show where the read models stand."`
	Health      healthCmd      `cmd:"" group:"Operations" help:"Ask a program's /readyz; exit 1 when it is not ready."`
	Audit       auditCmd       `cmd:"" group:"Operations" help:"Check the invariants of a running shop over HTTP; exit 1 when one is broken."`
	Load        loadCmd        `cmd:"" group:"Operations" help:"Drive the HTTP API with invoices or made-up customers, and report."`

	LogLevel  slog.Level `default:"info" env:"WHARF_LOG_LEVEL" help:"Log debug, info, warn or error and worse."`
	LogFormat string     `default:"text" enum:"text,json" env:"WHARF_LOG_FORMAT" help:"Log as text or json."`
}

// The exit codes of every program.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

// stopTimeout is for a program that was told to stop and waits for what does not answer: a Kafka that stands still, for one.
// Requests are drained for half of it.
const stopTimeout = 30 * time.Second

// stdout is standard output. It remembers the first error, because a verdict that nobody got is a failure.
var stdout = &output{}

type output struct{ err error }

// Write implements io.Writer.
func (o *output) Write(p []byte) (int, error) {
	n, err := os.Stdout.Write(p)
	if o.err == nil {
		o.err = err
	}
	return n, err
}

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	var c cli
	code := -1
	parser := kong.Must(&c, kong.Name("wharf"), kong.UsageOnError(), kong.Writers(os.Stdout, os.Stderr),
		kong.Description("An order-fulfilment shop, event-sourced on Kafka. Start with: wharf demo"),
		kong.Exit(func(n int) { code = n }))
	parsed, err := parser.Parse(args)
	if code == 0 {
		return 0 // --help
	}
	if err != nil {
		help := "wharf"
		var wrong *kong.ParseError
		if errors.As(err, &wrong) && wrong.Context.Selected() != nil {
			help = "wharf " + commandName(wrong.Context.Command())
		}
		fmt.Fprintf(os.Stderr, "wharf: %v\nTry: %s --help\n", err, help)
		return exitUsage
	}
	// Traces are made and passed on through HTTP, commits and events; who wants to see them adds an exporter here.
	shutdown, err := telemetry.Setup(os.Stderr, c.LogLevel, c.LogFormat)
	if err != nil {
		fmt.Fprintf(os.Stderr, "wharf: %v\n", err)
		return exitUsage
	}
	defer func() { _ = shutdown(context.Background()) }()

	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		s := <-signals
		cancel(interrupted{s})
		select {
		case <-signals: // a second one does not wait
			os.Exit(exitInterrupted)
		case <-time.After(stopTimeout):
			fmt.Fprintf(os.Stderr, "wharf: not at an end %s after it was told to stop: leaving as if killed, which loses nothing\n", stopTimeout)
			os.Exit(exitFailed)
		}
	}()
	parsed.BindTo(ctx, (*context.Context)(nil))
	if err = parsed.Run(); err == nil {
		err = stdout.err
	}
	var by interrupted
	switch {
	case errors.As(context.Cause(ctx), &by) && (err == nil || errors.Is(err, context.Canceled) || by.signal == os.Interrupt):
		if err == nil && by.signal == syscall.SIGTERM {
			return 0 // a server that was told to stop, and did
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "wharf %s: interrupted\n", commandName(parsed.Command()))
		}
		return exitInterrupted
	case err != nil:
		fmt.Fprintf(os.Stderr, "wharf %s: %v\n", commandName(parsed.Command()), err)
		var usage usageError
		if errors.As(err, &usage) {
			return exitUsage
		}
		return exitFailed
	}
	return 0
}

// commandName is the command without its arguments.
func commandName(command string) string {
	name, _, _ := strings.Cut(command, " <")
	return name
}

// interrupted is why the context of a program ended.
type interrupted struct{ signal os.Signal }

func (i interrupted) Error() string { return i.signal.String() }

// usageError is a mistake in how a program was called.
type usageError string

func (e usageError) Error() string { return string(e) }

// brokersFlag, databaseFlag and addrFlag are flags that many programs have.
type brokersFlag struct {
	KafkaBrokers brokers `name:"kafka-brokers" env:"WHARF_KAFKA_BROKERS" required:"" placeholder:"HOST:PORT" help:"Kafka's brokers."`
}

// brokers is where Kafka is.
type brokers []string

// Validate implements kong's validation.
func (b brokers) Validate() error {
	for _, addr := range b {
		if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
			return fmt.Errorf("expected host:port, not %q", addr)
		}
	}
	return nil
}

type databaseFlag struct {
	DatabaseURL string `name:"database-url" env:"WHARF_DATABASE_URL" required:"" placeholder:"URL" help:"The Postgres of the read models."`
}

type addrFlag struct {
	Addr string `env:"WHARF_ADDR" default:":8080" help:"Address to serve HTTP at."`
}

type partitionsFlag struct {
	Partitions int `env:"WHARF_PARTITIONS" default:"12" help:"Partitions of every topic. Fixed once there are topics."`
}

// Validate implements kong's validation.
func (f partitionsFlag) Validate() error {
	if f.Partitions < 1 || f.Partitions > 1000 {
		return errors.New("--partitions must be from 1 to 1000")
	}
	return nil
}

func positive(name string, d time.Duration) error {
	if d <= 0 {
		return usageError(name + " must be above 0")
	}
	return nil
}

func baseURL(s string) string { return strings.TrimRight(s, "/") }
