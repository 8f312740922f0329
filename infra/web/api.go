// Package web answers the question "how does the shop speak HTTP?": one way to make an API, one table of errors, one
// server. What can be asked stands in commands and projections; start with errors.go, then server.go.
package web

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/danielgtaylor/huma/v2/validation"
	fastjson "github.com/go-json-experiment/json/v1"
)

func init() {
	huma.NewError = func(status int, message string, errs ...error) huma.StatusError {
		return newError(status, message, errs...)
	}
	huma.NewErrorWithContext = func(_ huma.Context, status int, message string, errs ...error) huma.StatusError {
		return newError(status, message, errs...)
	}
	huma.DefaultArrayNullable = false
	huma.ValidateStrictCasing = true
	validation.MsgExpectedMinimumNumber = "expected number >= %.0f"
	validation.MsgExpectedMaximumNumber = "expected number <= %.0f"
}

// MaxBody is how large a request's body may be: twice the largest order in the longest spelling of its names.
const MaxBody = 4 << 20

// NewAPI makes an API whose routes land on the mux. Register routes on it; it serves nothing else.
func NewAPI(mux *http.ServeMux) huma.API {
	config := huma.DefaultConfig("Wharf", "1.0.0")
	config.Info.Description = "An order-fulfilment shop. Commands are answered when they are certain, queries a moment later."
	config.OpenAPIPath, config.DocsPath, config.SchemasPath = "", "", ""
	config.CreateHooks = nil // no "$schema" and no Link to it
	config.RejectUnknownQueryParameters = true
	format := huma.Format{
		Marshal: func(w io.Writer, v any) error {
			e := fastjson.NewEncoder(w)
			e.SetEscapeHTML(false)
			return e.Encode(v)
		},
		Unmarshal: unmarshal,
	}
	config.Formats = map[string]huma.Format{"application/json": format, "json": format}
	config.DefaultFormat = "application/json"
	api := humago.New(mux, config)
	api.OpenAPI().OnAddOperation = append(api.OpenAPI().OnAddOperation, func(_ *huma.OpenAPI, op *huma.Operation) {
		op.MaxBodyBytes = MaxBody
		document(op)
	})
	return api
}

// document adds the answers that huma does not know of.
func document(op *huma.Operation) {
	problem := op.Responses["default"]
	if problem == nil {
		return
	}
	statuses := []int{http.StatusBadRequest, http.StatusNotFound, http.StatusUnprocessableEntity, http.StatusServiceUnavailable}
	if op.Method == http.MethodPost {
		statuses = append(statuses, http.StatusConflict, http.StatusPreconditionFailed, http.StatusRequestEntityTooLarge,
			http.StatusUnsupportedMediaType, http.StatusGatewayTimeout)
	} else {
		op.Responses["304"] = &huma.Response{Description: http.StatusText(http.StatusNotModified)}
		op.Parameters = append(op.Parameters, &huma.Param{Name: "If-None-Match", In: "header", Schema: &huma.Schema{Type: huma.TypeString},
			Description: "ETags of answers that the caller has: 304 without a body if this one is among them."})
	}
	for _, status := range statuses {
		response := &huma.Response{Description: http.StatusText(status), Content: problem.Content}
		if status == http.StatusServiceUnavailable {
			response.Headers = map[string]*huma.Param{"Retry-After": {Schema: &huma.Schema{Type: huma.TypeInteger}}}
		}
		op.Responses[strconv.Itoa(status)] = response
	}
}

// unmarshal is json.Unmarshal with errors that name a field and never repeat a value.
func unmarshal(data []byte, v any) error {
	if !utf8.Valid(data) {
		return errors.New("expected UTF-8")
	}
	err := json.Unmarshal(data, v)
	var wrong *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &wrong):
		return fmt.Errorf("%s: expected a value as documented, a whole number without fraction or exponent", wrong.Field)
	case errors.As(err, &syntax):
		return errors.New("expected JSON")
	}
	return errors.New("expected JSON of the documented shape")
}

// Document is the OpenAPI document of all routes that the functions register.
func Document(register ...func(huma.API)) ([]byte, error) {
	api := NewAPI(http.NewServeMux())
	for _, r := range register {
		r(api)
	}
	return json.Marshal(api.OpenAPI())
}
