package main

import (
	"context"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"wharf/commands"
	ordersapi "wharf/commands/orders"
	"wharf/domain/orders"
	"wharf/infra/kafka"
)

type ordersCmd struct {
	brokersFlag
	partitionsFlag
	addrFlag
	deadlineFlag
}

type deadlineFlag struct {
	OrderDeadline time.Duration `env:"WHARF_ORDER_DEADLINE" default:"15m" help:"An order that is not confirmed by then expires."`
}

// Run implements the subcommand.
func (c *ordersCmd) Run(ctx context.Context) error {
	if err := positive("--order-deadline", c.OrderDeadline); err != nil {
		return err
	}
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: c.KafkaBrokers, ClientID: "wharf-orders"})
	if err != nil {
		return err
	}
	defer client.Close()
	return serve(ctx, l, client, ordersPart(client, c.Partitions, c.OrderDeadline))
}

func ordersPart(client *kafka.Client, partitions int, deadline time.Duration) part {
	s := newService(client, "orders", partitions, orders.Events, commands.Orders)
	api := ordersapi.Service{Journal: s.journal, Deadline: deadline, Now: time.Now}
	s.drive = api.Deadlines
	return part{register: func(a huma.API) { ordersapi.Register(a, api) }, run: s.run, ready: s.ready}
}
