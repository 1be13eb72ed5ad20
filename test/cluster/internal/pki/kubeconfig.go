package pki

import (
	"encoding/json"
	"fmt"
)

// Kubeconfig describes a kubeconfig with one cluster, one user and one context.
type Kubeconfig struct {
	Server    string
	CA        []byte
	Context   string // also the cluster's name in the file
	User      string
	Namespace string // the context's default namespace; may be empty
	Client    Pair   // the user's credentials, or
	Plugin    string // the path of an exec plugin that prints them
}

// Encode renders the kubeconfig. JSON is YAML too.
func (k Kubeconfig) Encode() ([]byte, error) {
	type m = map[string]any
	user := m{"client-certificate-data": k.Client.Cert, "client-key-data": k.Client.Key}
	if k.Plugin != "" {
		user = m{"exec": m{
			"apiVersion":      "client.authentication.k8s.io/v1",
			"command":         k.Plugin,
			"interactiveMode": "Never",
		}}
	}
	context := m{"cluster": k.Context, "user": k.User}
	if k.Namespace != "" {
		context["namespace"] = k.Namespace
	}
	b, err := json.MarshalIndent(m{
		"apiVersion":      "v1",
		"kind":            "Config",
		"clusters":        []m{{"name": k.Context, "cluster": m{"server": k.Server, "certificate-authority-data": k.CA}}},
		"users":           []m{{"name": k.User, "user": user}},
		"contexts":        []m{{"name": k.Context, "context": context}},
		"current-context": k.Context,
	}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode the kubeconfig of %s: %w", k.User, err)
	}
	return append(b, '\n'), nil
}

// ExecCredential renders what an exec plugin prints to hand over a client certificate.
func ExecCredential(p Pair) ([]byte, error) {
	type m = map[string]any
	b, err := json.Marshal(m{
		"apiVersion": "client.authentication.k8s.io/v1",
		"kind":       "ExecCredential",
		"status":     m{"clientCertificateData": string(p.Cert), "clientKeyData": string(p.Key)},
	})
	if err != nil {
		return nil, fmt.Errorf("encode an ExecCredential: %w", err)
	}
	return append(b, '\n'), nil
}
