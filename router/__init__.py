"""The router follows every request from Submit to its end. It knows requests, the workers know memory."""
