package web

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"
)

// tokenHeader carries a position: out of a command's answer, into a query.
const tokenHeader = "Consistency-Token"

// Installation names the topics that positions are of, so that a token of other topics is known for what it is. Outside
// a position is a token: opaque, and checked when it comes back. It keeps no secret: all that a made-up one can do is to
// make its query wait.
type Installation string

// InstallationOf is the one whose topics have these ids.
func InstallationOf(topicIDs map[string]string) Installation {
	var name []string
	for _, topic := range slices.Sorted(maps.Keys(topicIDs)) {
		name = append(name, topic+"="+topicIDs[topic])
	}
	return Installation(strings.Join(name, ","))
}

const tagBytes = 6

// seal makes a token of a position.
func (i Installation) seal(position string) string {
	token := append(i.tag(), position...)
	return base64.RawURLEncoding.EncodeToString(append(token, checksum(token)...))
}

// open reverses seal. It returns what is wrong with the token, if something is.
func (i Installation) open(token string) (position, wrong string) {
	data, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(data) <= 2*tagBytes || !bytes.Equal(checksum(data[:len(data)-tagBytes]), data[len(data)-tagBytes:]) {
		return "", "expected what a command has answered"
	}
	if !bytes.Equal(data[:tagBytes], i.tag()) {
		return "", "the token is of another installation, or its topics were made anew"
	}
	return string(data[tagBytes : len(data)-tagBytes]), ""
}

func (i Installation) tag() []byte { return checksum([]byte(i)) }

func checksum(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:tagBytes:tagBytes]
}

// openToken puts the position in the place of the request's token, or says what is wrong with it.
func (i Installation) openToken(r *http.Request) *Problem {
	tokens := r.Header.Values(tokenHeader)
	if len(tokens) == 0 || r.Method != http.MethodGet && r.Method != http.MethodHead {
		return nil // commands have no use for one
	}
	position, wrong := i.open(tokens[0])
	if len(tokens) > 1 {
		wrong = "expected one value"
	}
	if wrong != "" {
		detail := &huma.ErrorDetail{Location: "header." + tokenHeader, Message: wrong}
		return newError(http.StatusUnprocessableEntity, "validation failed", detail)
	}
	r.Header.Set(tokenHeader, position)
	return nil
}

// sealToken puts the token in the place of the answer's position.
func (i Installation) sealToken(h http.Header) {
	if position := h.Get(tokenHeader); position != "" {
		h.Set(tokenHeader, i.seal(position))
	}
}
