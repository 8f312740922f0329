package main

import (
	"context"

	"github.com/danielgtaylor/huma/v2"

	"wharf/commands"
	shippingapi "wharf/commands/shipping"
	"wharf/domain/shipping"
	"wharf/infra/kafka"
)

type shippingCmd struct {
	brokersFlag
	partitionsFlag
	addrFlag
}

// Run implements the subcommand.
func (c *shippingCmd) Run(ctx context.Context) error {
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: c.KafkaBrokers, ClientID: "wharf-shipping"})
	if err != nil {
		return err
	}
	defer client.Close()
	return serve(ctx, l, client, shippingPart(client, c.Partitions))
}

func shippingPart(client *kafka.Client, partitions int) part {
	s := newService(client, "shipping", partitions, shipping.Events, commands.Shipping)
	api := shippingapi.Service{Journal: s.journal}
	return part{register: func(a huma.API) { shippingapi.Register(a, api) }, run: s.run, ready: s.ready}
}
