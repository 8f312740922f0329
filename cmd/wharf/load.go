package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"

	"wharf/infra/load"
)

type urlFlag struct {
	URL string `env:"WHARF_URL" default:"http://127.0.0.1:8080" help:"The shop."`
}

// Validate implements kong's validation.
func (f urlFlag) Validate() error {
	if u, err := url.Parse(f.URL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return errors.New("--url: expected something like http://127.0.0.1:8080")
	}
	return nil
}

type loadCmd struct {
	urlFlag
	File        string `type:"existingfile" help:"Invoices, as CSV, gzipped or not. Without it orders are made up."`
	Stock       int    `default:"100" help:"Per cent of what the orders ask for that is received."`
	Orders      int    `help:"At most so many orders; 0 for all of the file, or 100 made-up ones."`
	Concurrency int    `default:"64" help:"Commands at a time."`
	ReadBack    bool   `help:"Read every order that was placed with the Consistency-Token of its placing, and count stale answers."`
	JSON        bool   `help:"Print the report as JSON."`
}

// Run implements the subcommand.
func (c *loadCmd) Run(ctx context.Context) error {
	switch {
	case c.Stock < 0 || c.Stock > 10_000:
		return usageError("--stock must be from 0 to 10000 per cent")
	case c.Orders < 0:
		return usageError("--orders must not be negative")
	case c.Concurrency < 1 || c.Concurrency > 4096:
		return usageError("--concurrency must be from 1 to 4096")
	}
	report, err := load.Run(ctx, load.Options{URL: baseURL(c.URL), File: c.File, Stock: c.Stock, Orders: c.Orders,
		Concurrency: c.Concurrency, ReadBack: c.ReadBack, Progress: os.Stderr})
	if err != nil {
		return err
	}
	if c.JSON {
		err = printJSON(report)
	} else {
		fmt.Fprint(stdout, report)
	}
	if err == nil && report.StaleReads > 0 {
		err = fmt.Errorf("%d answers did not know what had been written before they were asked for", report.StaleReads)
	}
	return err
}
