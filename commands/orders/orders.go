// Package orders answers the question "what can be asked of the orders service?". This file is its whole HTTP command
// API; what it does on events of other services stands in commands/choreography.go, and deadlines.go lets time pass.
package orders

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/orders"
)

// Service is what the commands need.
type Service struct {
	Journal  commands.Journal[orders.Order]
	Deadline time.Duration // from placed to confirmed
	Now      func() time.Time
}

type place struct {
	commands.Conditions
	Body struct {
		Customer string      `json:"customer" minLength:"1" maxLength:"200" pattern:"^[^\\x00-\\x1f\\x7f-\\x9f]*$" patternDescription:"free of control characters"`
		Lines    []orderLine `json:"lines" minItems:"1" maxItems:"2000"`
	}
}

type orderLine struct {
	SKU       string         `json:"sku" minLength:"1" maxLength:"64" pattern:"^[^\\x00-\\x1f\\x7f-\\x9f]*$" patternDescription:"free of control characters"`
	Quantity  int64          `json:"quantity" minimum:"1" maximum:"1000000"`
	UnitPrice commands.Price `json:"unit_price"`
}

// Resolve checks what the fields have to do with each other: the same as the domain does, but it names the line.
func (p *place) Resolve(c huma.Context) []error {
	errs := p.Conditions.Resolve(c)
	total := domain.Money{}
	for i, l := range p.lines() {
		price, err := domain.Money(l.UnitPrice).Times(l.Quantity)
		if l.Quantity < 1 || l.UnitPrice.Amount < 1 {
			continue // has been found already
		}
		if i == 0 {
			total.Currency = price.Currency
		} else if l.UnitPrice.Currency != p.Body.Lines[0].UnitPrice.Currency {
			return append(errs, &huma.ErrorDetail{Location: fmt.Sprintf("body.lines[%d].unit_price.currency", i),
				Message: "expected the currency of the first line"})
		}
		if err == nil {
			total, err = total.Plus(price)
		}
		if err != nil {
			return append(errs, &huma.ErrorDetail{Location: fmt.Sprintf("body.lines[%d].unit_price.amount", i),
				Message: "expected a total of less than 2^63"})
		}
	}
	return errs
}

func (p *place) lines() []orders.Line {
	lines := make([]orders.Line, len(p.Body.Lines))
	for i, l := range p.Body.Lines {
		lines[i] = orders.Line{SKU: l.SKU, Quantity: l.Quantity, UnitPrice: domain.Money(l.UnitPrice)}
	}
	return lines
}

type cancel struct {
	ID commands.OrderID `path:"id"`
	commands.Conditions
	Body struct {
		Reason string `json:"reason" minLength:"1" maxLength:"200" pattern:"^[^\\x00-\\x1f\\x7f-\\x9f]*$" patternDescription:"free of control characters"`
	}
}

// Register adds the service's commands to the API.
func Register(api huma.API, s Service) {
	huma.Register(api, huma.Operation{
		OperationID: "place-order", Method: http.MethodPost, Path: "/orders", DefaultStatus: http.StatusCreated,
		Summary: "Place an order", Tags: []string{"orders"},
	}, func(ctx context.Context, in *place) (*commands.Accepted, error) {
		id := in.NewID("order").String()
		cmd, err := in.Command(ctx, id, "place", in.Body)
		if err != nil {
			return nil, err
		}
		lines, deadline := in.lines(), s.Now().Add(s.Deadline).UTC().Truncate(time.Millisecond)
		receipt, err := s.Journal.Handle(ctx, cmd, func(o orders.Order) ([]domain.Event, error) {
			return o.DecidePlace(in.Body.Customer, lines, deadline)
		})
		out, err := commands.Accept(http.StatusCreated, receipt, err)
		if err == nil {
			out.Location = "/orders/" + id
		}
		return out, err
	})

	huma.Register(api, huma.Operation{
		OperationID: "cancel-order", Method: http.MethodPost, Path: "/orders/{id}/cancel",
		Summary: "Cancel an order", Tags: []string{"orders"},
		Description: "At once (200) before it is confirmed. After that the shipment decides (202): the order is " +
			"`cancelling` and ends `cancelled`, or goes on `shipped`.",
	}, func(ctx context.Context, in *cancel) (*commands.Accepted, error) {
		id := string(in.ID)
		cmd, err := in.Command(ctx, id, "cancel", in.Body)
		if err != nil {
			return nil, err
		}
		status := 0
		cmd.Note = &status
		receipt, err := s.Journal.Handle(ctx, cmd, func(o orders.Order) ([]domain.Event, error) {
			if status = http.StatusOK; o.Status == orders.StatusConfirmed || o.Status == orders.StatusCancelling {
				status = http.StatusAccepted
			}
			return o.DecideCancel(in.Body.Reason)
		})
		return commands.Accept(receipt.Note, receipt, err)
	})
	// Which huma cannot tell from the output.
	responses := api.OpenAPI().Paths["/orders/{id}/cancel"].Post.Responses
	responses["202"] = responses["200"]
}
