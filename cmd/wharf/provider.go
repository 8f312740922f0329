package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"wharf/infra/provider"
	"wharf/infra/telemetry"
	"wharf/infra/web"
)

type paymentProviderCmd struct {
	addrFlag
	faultFlags
	File string `env:"WHARF_PROVIDER_FILE" help:"Remembers deeds across restarts; without it they are kept in memory."`
}

type faultFlags struct {
	ProviderDecline  float64       `env:"WHARF_PROVIDER_DECLINE" default:"0" help:"Share of authorisations that the stand-in provider declines, 0 to 1."`
	ProviderNoAnswer float64       `env:"WHARF_PROVIDER_NO_ANSWER" default:"0" help:"Share of requests that it does and never answers."`
	ProviderSlow     float64       `env:"WHARF_PROVIDER_SLOW" default:"0" help:"Share of requests that it answers late."`
	ProviderRepeat   float64       `env:"WHARF_PROVIDER_REPEAT" default:"0" help:"Share of requests that it does and answers 500, so that they come again."`
	ProviderDelay    time.Duration `env:"WHARF_PROVIDER_DELAY" default:"1s" help:"How late late answers are."`
}

func (f faultFlags) faults() (provider.Faults, error) {
	for _, rate := range []float64{f.ProviderDecline, f.ProviderNoAnswer, f.ProviderSlow, f.ProviderRepeat} {
		if rate < 0 || rate > 1 {
			return provider.Faults{}, usageError("the shares of the provider's faults must be from 0 to 1")
		}
	}
	return provider.Faults{Decline: f.ProviderDecline, Timeout: f.ProviderNoAnswer, Slow: f.ProviderSlow,
		Repeat: f.ProviderRepeat, Delay: f.ProviderDelay}, nil
}

// Run implements the subcommand.
func (c *paymentProviderCmd) Run(ctx context.Context) error {
	faults, err := c.faults()
	if err != nil {
		return err
	}
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	slog.Info("serving", "addr", l.Addr().String())
	return serveProvider(ctx, l, provider.Options{Faults: faults, File: c.File})
}

func serveProvider(ctx context.Context, l net.Listener, o provider.Options) error {
	server, err := provider.Open(o)
	if err != nil {
		return fmt.Errorf("open the payment provider: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/", server)
	mux.Handle("GET /metrics", telemetry.Metrics())
	context.AfterFunc(ctx, func() { _ = server.Close() }) // lets go of requests that are never answered
	return web.Serve(ctx, l, mux)
}
