// Package payments answers the question "what can be asked of the payments service?". This file is its whole HTTP
// command API; what it does on events of other services stands in commands/choreography.go, and intents.go asks the
// payment provider.
package payments

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/payments"
)

// Service is what the commands and the intents need.
type Service struct {
	Journal  commands.Journal[payments.Payment]
	Provider Provider
}

type refund struct {
	Order commands.OrderID `path:"order"`
	commands.Conditions
	Body struct {
		Amount commands.Price `json:"amount"`
	}
}

// Register adds the service's commands to the API.
func Register(api huma.API, s Service) {
	huma.Register(api, huma.Operation{
		OperationID: "refund-payment", Method: http.MethodPost, Path: "/payments/{order}/refund",
		DefaultStatus: http.StatusAccepted,
		Summary:       "Pay back part or all of what was captured", Tags: []string{"payments"},
		Description: "The provider is asked later: the payment's `pending` shows what it has not answered.",
	}, func(ctx context.Context, in *refund) (*commands.Accepted, error) {
		cmd, err := in.Command(ctx, string(in.Order), "refund", in.Body)
		if err != nil {
			return nil, err
		}
		// Not made from the key: the journal forgets keys at last, and the provider never does.
		id := uuid.New()
		receipt, err := s.Journal.Handle(ctx, cmd, func(p payments.Payment) ([]domain.Event, error) {
			return p.DecideRefund(id, domain.Money(in.Body.Amount))
		})
		return commands.Accept(http.StatusAccepted, receipt, err)
	})
}
