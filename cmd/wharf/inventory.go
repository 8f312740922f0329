package main

import (
	"context"

	"github.com/danielgtaylor/huma/v2"

	"wharf/commands"
	inventoryapi "wharf/commands/inventory"
	"wharf/domain/inventory"
	"wharf/infra/kafka"
)

type inventoryCmd struct {
	brokersFlag
	partitionsFlag
	addrFlag
}

// Run implements the subcommand.
func (c *inventoryCmd) Run(ctx context.Context) error {
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: c.KafkaBrokers, ClientID: "wharf-inventory"})
	if err != nil {
		return err
	}
	defer client.Close()
	return serve(ctx, l, client, inventoryPart(client, c.Partitions))
}

func inventoryPart(client *kafka.Client, partitions int) part {
	s := newService(client, "inventory", partitions, inventory.Events, commands.Inventory)
	api := inventoryapi.Service{Journal: s.journal}
	return part{register: func(a huma.API) { inventoryapi.Register(a, api) }, run: s.run, ready: s.ready}
}
