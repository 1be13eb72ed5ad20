// Command istio is what of Istio runs in the tests: its control plane as it is
// (`istio discovery`), and a client without a proxy that lets itself be routed by it
// (`istio call`, gRPC with xDS). No proxy (Envoy) is needed for that.
package main

import (
	"errors"
	"fmt"
	"os"

	"istio.io/istio/pilot/cmd/pilot-discovery/app"
	"istio.io/istio/pkg/log"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "istio:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("discovery or call?")
	}
	if args[0] == "call" {
		return call(args[1:])
	}
	log.EnableKlogWithCobra()
	return app.NewRootCommand().Execute()
}
