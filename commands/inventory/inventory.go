// Package inventory answers the question "what can be asked of the inventory service?". This file is its whole HTTP
// command API; what it does on events of other services stands in commands/choreography.go.
package inventory

import (
	"context"
	"net/http"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/inventory"
)

// Service is what the commands need.
type Service struct {
	Journal commands.Journal[inventory.Stock]
}

// SKU is the path parameter of every command here.
type SKU struct {
	SKU string `path:"sku" minLength:"1" maxLength:"64" pattern:"^[^\\x00-\\x1f\\x7f-\\x9f]*$" patternDescription:"free of control characters"`
}

// Resolve refuses bytes that are no text: JSON could not carry them.
func (s *SKU) Resolve(huma.Context) []error {
	if !utf8.ValidString(s.SKU) {
		return []error{&huma.ErrorDetail{Location: "path.sku", Message: "expected UTF-8"}}
	}
	return nil
}

type receive struct {
	SKU
	commands.Conditions
	Body struct {
		Quantity int64 `json:"quantity" minimum:"1" maximum:"1000000000"`
	}
}

type adjust struct {
	SKU
	commands.Conditions
	Body adjustment
}

type adjustment struct {
	Delta  int64  `json:"delta" minimum:"-1000000000" maximum:"1000000000" doc:"Units, not 0."`
	Reason string `json:"reason" minLength:"1" maxLength:"200" pattern:"^[^\\x00-\\x1f\\x7f-\\x9f]*$" patternDescription:"free of control characters"`
}

// Resolve refuses a correction that corrects nothing.
func (a *adjustment) Resolve(_ huma.Context, path *huma.PathBuffer) []error {
	if a.Delta == 0 {
		return []error{&huma.ErrorDetail{Location: path.With("delta"), Message: "expected a number other than 0"}}
	}
	return nil
}

// Register adds the service's commands to the API.
func Register(api huma.API, s Service) {
	huma.Register(api, huma.Operation{
		OperationID: "receive-stock", Method: http.MethodPost, Path: "/stock/{sku}/receive",
		Summary: "Receive units of a SKU", Tags: []string{"stock"},
	}, func(ctx context.Context, in *receive) (*commands.Accepted, error) {
		cmd, err := in.Command(ctx, in.SKU.SKU, "receive", in.Body)
		if err != nil {
			return nil, err
		}
		receipt, err := s.Journal.Handle(ctx, cmd, func(s inventory.Stock) ([]domain.Event, error) {
			return s.DecideReceive(in.Body.Quantity)
		})
		return commands.Accept(http.StatusOK, receipt, err)
	})

	huma.Register(api, huma.Operation{
		OperationID: "adjust-stock", Method: http.MethodPost, Path: "/stock/{sku}/adjust",
		Summary: "Correct the count of a SKU", Tags: []string{"stock"},
	}, func(ctx context.Context, in *adjust) (*commands.Accepted, error) {
		cmd, err := in.Command(ctx, in.SKU.SKU, "adjust", in.Body)
		if err != nil {
			return nil, err
		}
		receipt, err := s.Journal.Handle(ctx, cmd, func(s inventory.Stock) ([]domain.Event, error) {
			return s.DecideAdjust(in.Body.Delta, in.Body.Reason)
		})
		return commands.Accept(http.StatusOK, receipt, err)
	})
}
