package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"wharf/infra/audit"
)

type auditCmd struct {
	urlFlag
	Wait time.Duration `default:"2m" help:"How long the shop may take to come to rest."`
	JSON bool          `help:"Print the broken invariants as JSON."`
}

// Run implements the subcommand.
func (c *auditCmd) Run(ctx context.Context) error {
	if err := positive("--wait", c.Wait); err != nil {
		return err
	}
	broken, summary, err := audit.Run(ctx, audit.Options{URL: baseURL(c.URL), Wait: c.Wait, Progress: os.Stderr})
	if err != nil {
		return err
	}
	if c.JSON {
		if broken == nil {
			broken = []audit.Violation{}
		}
		if err := printJSON(map[string]any{"items": broken, "summary": summary}); err != nil {
			return err
		}
	} else {
		for _, v := range broken {
			fmt.Fprintln(stdout, v)
		}
		fmt.Fprintf(stdout, "%d orders, %d payments, %d shipments, %d SKUs: %d invariants broken\n",
			summary.Orders, summary.Payments, summary.Shipments, summary.SKUs, len(broken))
	}
	if len(broken) > 0 {
		return fmt.Errorf("%d invariants are broken, the first: %s", len(broken), broken[0])
	}
	return nil
}
