// Package shipping answers the question "what can be asked of the shipping service?". This file is its whole HTTP
// command API; what it does on events of other services stands in commands/choreography.go.
package shipping

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/shipping"
)

// Service is what the commands need.
type Service struct {
	Journal commands.Journal[shipping.Shipment]
}

type dispatch struct {
	Order commands.OrderID `path:"order"`
	commands.Conditions
	Body struct {
		Carrier  string `json:"carrier" minLength:"1" maxLength:"200" pattern:"^[^\\x00-\\x1f\\x7f-\\x9f]*$" patternDescription:"free of control characters"`
		Tracking string `json:"tracking" minLength:"1" maxLength:"200" pattern:"^[^\\x00-\\x1f\\x7f-\\x9f]*$" patternDescription:"free of control characters"`
	}
}

type deliver struct {
	Order commands.OrderID `path:"order"`
	commands.Conditions
}

// Register adds the service's commands to the API.
func Register(api huma.API, s Service) {
	huma.Register(api, huma.Operation{
		OperationID: "dispatch-shipment", Method: http.MethodPost, Path: "/shipments/{order}/dispatch",
		Summary: "Send an order off", Tags: []string{"shipments"},
	}, func(ctx context.Context, in *dispatch) (*commands.Accepted, error) {
		cmd, err := in.Command(ctx, string(in.Order), "dispatch", in.Body)
		if err != nil {
			return nil, err
		}
		receipt, err := s.Journal.Handle(ctx, cmd, func(s shipping.Shipment) ([]domain.Event, error) {
			return s.DecideDispatch(in.Body.Carrier, in.Body.Tracking)
		})
		return commands.Accept(http.StatusOK, receipt, err)
	})

	huma.Register(api, huma.Operation{
		OperationID: "deliver-shipment", Method: http.MethodPost, Path: "/shipments/{order}/deliver",
		Summary: "Hand an order over", Tags: []string{"shipments"},
	}, func(ctx context.Context, in *deliver) (*commands.Accepted, error) {
		cmd, err := in.Command(ctx, string(in.Order), "deliver", nil)
		if err != nil {
			return nil, err
		}
		receipt, err := s.Journal.Handle(ctx, cmd, shipping.Shipment.DecideDeliver)
		return commands.Accept(http.StatusOK, receipt, err)
	})
}
