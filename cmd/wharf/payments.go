package main

import (
	"context"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"wharf/commands"
	paymentsapi "wharf/commands/payments"
	"wharf/domain/payments"
	"wharf/infra/kafka"
	"wharf/infra/provider"
)

type paymentsCmd struct {
	brokersFlag
	partitionsFlag
	addrFlag
	ProviderURL     string        `env:"WHARF_PROVIDER_URL" required:"" placeholder:"URL" help:"The payment provider."`
	ProviderTimeout time.Duration `env:"WHARF_PROVIDER_TIMEOUT" default:"5s" help:"A request to it that takes longer is made again."`
}

// Run implements the subcommand.
func (c *paymentsCmd) Run(ctx context.Context) error {
	if err := positive("--provider-timeout", c.ProviderTimeout); err != nil {
		return err
	}
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: c.KafkaBrokers, ClientID: "wharf-payments"})
	if err != nil {
		return err
	}
	defer client.Close()
	p := provider.NewClient(baseURL(c.ProviderURL), c.ProviderTimeout)
	defer p.Close()
	return serve(ctx, l, client, paymentsPart(client, c.Partitions, p))
}

func paymentsPart(client *kafka.Client, partitions int, p *provider.Client) part {
	s := newService(client, "payments", partitions, payments.Events, commands.Payments)
	api := paymentsapi.Service{Journal: s.journal, Provider: asker{p}}
	s.drive = api.Intents
	return part{register: func(a huma.API) { paymentsapi.Register(a, api) }, run: s.run, ready: s.ready}
}

// asker makes an intent a request to the provider.
type asker struct{ client *provider.Client }

func (a asker) Ask(ctx context.Context, order string, i payments.Intent) (payments.Answer, error) {
	answer, err := a.client.Do(ctx, provider.Request{
		Kind: string(i.Kind), Key: i.Key(order), AuthorizationKey: payments.Intent{Kind: payments.Authorize}.Key(order),
		Order: order, Amount: i.Amount,
	})
	return payments.Answer(answer), err
}
