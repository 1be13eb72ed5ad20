package main

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
)

// versions is what `version -o json` prints.
type versions struct {
	Client struct {
		Version  string `json:"version"`
		Go       string `json:"go"`
		Platform string `json:"platform"`
	} `json:"client"`
	Daemon *api.Version `json:"daemon,omitempty"`
	Error  *api.Error   `json:"error,omitempty"` // why the daemon's is not known
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Show the versions of this program and of the daemon",
		Example: examples(a.name, "culvert version\nculvert version -o json"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var v versions
			v.Client.Version, v.Client.Go, v.Client.Platform = version.Version, runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH
			daemon, err := api.New(a.socket).Version(cmd.Context())
			if err != nil {
				v.Error = asError(err)
			} else {
				v.Daemon = &daemon
			}
			if a.json() {
				enc := json.NewEncoder(a.out)
				enc.SetIndent("", "  ")
				return enc.Encode(v)
			}
			fmt.Fprintf(a.out, "culvert   %s (%s, %s)\n", v.Client.Version, v.Client.Go, v.Client.Platform)
			switch {
			case v.Error != nil:
				fmt.Fprintf(a.out, "culvertd  %s\n", v.Error.Message)
			case v.Daemon.Version != v.Client.Version:
				fmt.Fprintf(a.out, "culvertd  %s: not this program's; restart it: sudo systemctl restart culvertd\n", v.Daemon.Version)
			default:
				fmt.Fprintf(a.out, "culvertd  %s\n", v.Daemon.Version)
			}
			return nil
		},
	}
}
